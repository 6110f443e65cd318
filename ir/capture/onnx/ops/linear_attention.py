"""LinearAttention: a state matrix a head that tokens are written into and read from, one after the other."""

from __future__ import annotations

import torch

from ....errors import SmeltError
from ..registry import Tensor, op

_GATED, _CORRECTED = ("gated", "gated_delta"), ("delta", "gated_delta")


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H D] as [B, H, T, D], in float32."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2).float()


@op("LinearAttention")
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """S = exp(g) S + k ⊗ v per token, or ⊗ beta (v - Sᵀk) in the delta rules; the output is scale qᵀS."""
    if update_rule not in ("linear", "gated", "delta", "gated_delta"):
        raise SmeltError(f"LinearAttention: no update_rule {update_rule!r}")
    if not isinstance(query.shape[1], int):
        raise SmeltError("LinearAttention is unrolled over tokens, so their number must be known")
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    gate = None if decay is None or update_rule not in _GATED else _heads(decay, kv_num_heads).exp()
    share = None if beta is None or update_rule not in _CORRECTED else _heads(beta, beta.shape[-1])
    if (update_rule in _GATED and gate is None) or (update_rule in _CORRECTED and share is None):
        raise SmeltError(f"LinearAttention: update_rule {update_rule!r} needs decay or beta, which is not given")
    state = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if past_state is None else past_state.float()
    outs = []
    for t in range(query.shape[1]):
        now, new = k[:, :, t], v[:, :, t]
        if gate is not None:
            state = state * gate[:, :, t, :, None]
        if share is not None:
            new = share[:, :, t] * (new - torch.einsum("bhdm,bhd->bhm", state, now))
        state = state + now[..., :, None] * new[..., None, :]
        read = state.repeat_interleave(q_num_heads // kv_num_heads, 1)
        outs.append(torch.einsum("bhd,bhdm->bhm", q[:, :, t], read))
    out = torch.stack(outs, 1) * (scale or k.shape[3] ** -0.5)  # [B, T, H, D]
    return out.flatten(2).to(query.dtype), state.to(query.dtype if past_state is None else past_state.dtype)
