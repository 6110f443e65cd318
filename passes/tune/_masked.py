"""Weights that stay as they are, under masks of ones and zeros that learn through scores (Zhao et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...ir import encoding as encodings
from ...ir.encoding import Affine, Bitmap, Dense, packing
from ...ir.program import Program
from ...ir.weight import Upon, Weight

SCORE = "score"


def maskable(weight: Weight) -> str | None:
    """Why zeros cannot be put among the values of a matrix, or None."""
    encoding = weight.encoding
    if isinstance(encoding, Dense) or (isinstance(encoding, Affine) and not encoding.zero):
        return None
    return f"stored as {encoding}, which has no zero of its own"


def scores(shape: tuple[int, ...], removed: float, chance: torch.Generator) -> torch.Tensor:
    """Scores float32 spread evenly over a span of 1, of which the share `removed` is not above 0."""
    return torch.rand(shape, generator=chance) - removed


@dataclass(frozen=True, eq=False)
class Masked(Weight):
    """A matrix of parts `data`, float32, and `score` of the same shape; where the score is not above 0, it is 0."""

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What is left; gradients reach scores as if they were the mask."""
        score = self.parts[SCORE]
        mask = (score > 0).float()
        return (self.parts["data"] * (mask + score - score.detach())).to(dtype)

    @property
    def mask(self) -> torch.Tensor:
        """Where values stay, bool."""
        return self.parts[SCORE].detach() > 0


def masked(weight: Weight, mask: torch.Tensor) -> Weight:
    """A matrix with zeros where the mask has none of its bits: as it was stored, or sparse where that takes less."""
    encoding = weight.encoding
    if isinstance(encoding, Affine):
        codes = packing.unpack(weight.parts, encoding.width, weight.shape[-1])
        codes = codes.masked_fill(~mask, 2 ** (encoding.width - 1))
        return replace(weight, parts=encoding.parts(codes, weight.parts["scale"]))
    value = weight.parts["data"].masked_fill(~mask, 0)
    dense = replace(weight, parts={"data": value})
    sparse = Bitmap(str(value.dtype).removeprefix("torch.")) if value.dtype != torch.float32 else None
    if sparse is None or sparse.refuses(weight.shape):
        return dense
    coded = Weight(weight.shape, *sparse.coded(value))
    return coded if coded.bits < dense.bits else dense


def upon(base: Program, name: str, weight: Weight, mask: torch.Tensor | None) -> Weight | None:
    """A weight as the base's of that name, with a bit for each value if there is a mask; None where it is another."""
    found = base.weights.get(name)
    if found is None or found.shape != weight.shape or not torch.equal(found.dense(), weight.dense()):
        return None
    if mask is None:
        return Weight(found.shape, found.encoding, Upon(name, found, {}))
    encoding = encodings.Masked(found.encoding)
    if encoding.refuses(found.shape):
        return None
    return Weight(found.shape, encoding, Upon(name, found, encoding.bits(mask)))
