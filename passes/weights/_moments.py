"""Second moments of what matrix products read, and how much each token counts in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.blocks import blocks
from ...ir.ops import ATTENTION, CACHED_ATTENTION, arguments
from .._walk import Walk
from ._matrices import Siblings


def moments(walk: Walk, x: fx.Node, counts: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """2 / T · Σ r x xᵀ float64 [K, K] over the T tokens of the text; `counts`: r [B, T] by piece, 1 without."""
    total, seen = torch.zeros(()), 0
    for i, (value,) in enumerate(walk.values(x)):
        rows = value.reshape(-1, value.shape[-1])
        if counts is not None:
            rows = rows * counts[i].reshape(-1, 1).sqrt()
        total, seen = total + (rows.T @ rows).double(), seen + len(rows)
    return total.mul_(2 / seen)


class Attended:
    """How much tokens count by the attention that they get in their layer, computed when a layer is first asked for.

    RSQ: Learning from Important Tokens Leads to Better Quantized LLMs (Sung et al., 2025, arXiv 2503.01820, section
    3.2): what the heads and queries of a layer give to a token, summed, then scaled by sequence to `least` … 1.
    """

    def __init__(self, walk: Walk, least: float) -> None:
        self.walk, self.least = walk, least
        self._layer, self._counts = -1, list[torch.Tensor]()

    def counts(self, of: Siblings) -> list[torch.Tensor] | None:
        """r [B, T] by piece of the text, of mean 1; None behind the last layer and in front of the first."""
        order = {node: i for i, node in enumerate(self.walk.program.graph.nodes)}
        found = [block for block in blocks(self.walk.program) if order[block.add] > order[of.nodes[0]]]
        if not found:
            return None
        layer = found[0].layer
        if layer != self._layer:
            self._layer, self._counts = layer, self._measured(layer)
        return self._counts

    def _measured(self, layer: int) -> list[torch.Tensor]:
        attention = list(self.walk.program.calls(ATTENTION, CACHED_ATTENTION))[layer]
        a, found = arguments(attention), []
        for query, key in self.walk.values(a["query"], a["key"]):
            rows = torch.stack([_mass(q, k, a) for q, k in zip(query, key, strict=True)])
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            rows = self.least + (1 - self.least) * (rows - low) / (high - low).clamp_min(1e-12)
            found.append(rows * rows.shape[1] / rows.sum(1, keepdim=True))
        return found


def _mass(query: torch.Tensor, key: torch.Tensor, a: Mapping[str, Any]) -> torch.Tensor:
    """Attention that each of T tokens gets, summed over heads and queries: query [H, T, D], key [G, T, D] → [T]."""
    length, window, softcap = query.shape[1], a.get("window"), a.get("softcap")
    back = torch.arange(length)[:, None] - torch.arange(length)
    seen = (back >= 0) | (not a.get("causal", True))
    if window is not None:
        seen &= back < window
    mass = query.new_zeros(length)
    for h, q in enumerate(query):  # a head at a time: [T, T] and not [H, T, T]
        logits = (q @ key[h * len(key) // len(query)].T).float() * a["scale"]
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        mass += logits.masked_fill(~seen, -torch.inf).softmax(-1).sum(0)
    return mass
