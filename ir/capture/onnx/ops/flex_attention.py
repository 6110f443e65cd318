"""FlexAttention of ONNX's preview domain: attention whose scores and shares pass through graphs of the node."""

from __future__ import annotations

import torch

from ..known import as_tensor
from ..registry import Body, DType, Tensor, op


@op("FlexAttention", domain="ai.onnx.preview")
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prob_mod: Body | None = None,
    scale: float | None = None,
    score_mod: Body | None = None,
    softmax_precision: DType | None = None,
) -> Tensor:
    """prob_mod(softmax(score_mod(scale · q kᵀ))) v with grouped heads."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    wide = softmax_precision or torch.promote_types(query.dtype, torch.float32)
    scores = ((query * root) @ (key * root).transpose(-1, -2)).to(wide)
    if score_mod is not None:
        scores = as_tensor(score_mod(scores)[0]).to(wide)
    shares = torch.softmax(scores, -1)
    if prob_mod is not None:
        shares = as_tensor(prob_mod(shares)[0]).to(wide)
    made: Tensor = (shares @ value.to(wide)).to(value.dtype)
    return made
