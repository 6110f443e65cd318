"""Codes that learn a few at a time: PV-Tuning (Malinovskii et al., 2024, arXiv 2405.14852).

What codes should stand for moves by gradients, from what they stood for first; an update then gives new codes to the
few groups that are farthest from that, and leaves the others where they are. So does the paper's released code; in its
Algorithm 1 what codes should stand for begins at the codes in each update, which here brought none to another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...ir.encoding import Affine, Encoding, packing
from ...ir.weight import Weight
from ..weights._books import books, nearest, shared
from ..weights._range import Steps, is_even

REACH = 8.0  # how much longer the step of codes is than that of scales, each relative to what it changes


def partial(encoding: Encoding, changes: float) -> bool:
    """Whether codes learn so: those of shared codebooks, and integers if `changes` is a share of them.

    Integers of 8 bits are fine enough for short steps.
    """
    return bool(shared(encoding)) or (isinstance(encoding, Affine) and encoding.width < 8 and changes < 1)


@dataclass(frozen=True, eq=False)
class Partial(Weight):
    """A matrix [N, K] with codes that are changed in place, and what they should stand for: `unit` times `leaf`.

    Gradients reach tables and scales, and the leaf, float32 [N, K], as if the values were its own.
    """

    leaf: torch.Tensor
    unit: float

    @classmethod
    def begun(
        cls, weight: Weight, parts: Mapping[str, torch.Tensor], size: float, value: torch.Tensor | None = None
    ) -> Partial:
        """With parts that learn or are its own, of values of about a size; `value` has the same codes, if given."""
        unit = REACH * size
        leaf = (weight.dense() if value is None else value) / unit
        return cls(weight.shape, weight.encoding, parts, leaf.requires_grad_(), unit)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """What changes beside the parts that learn."""
        codes = {part: value for part, value in self.parts.items() if not value.is_floating_point()}
        return {**codes, "leaf": self.leaf}

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values."""
        return (super().dense() + (self.leaf - self.leaf.detach()) * self.unit).to(dtype)

    @torch.no_grad()
    def settle(self, changes: float) -> None:
        """Give the share `changes` of groups that are farthest from the leaf the nearest codes."""
        wanted = self.leaf * self.unit
        terms = books(self.encoding, self.parts, (self.shape[0], self.shape[1]))
        dims = next(iter(terms.values())).encoding.dims if terms else 1
        far = (wanted - super().dense()).reshape(-1, dims).square().sum(1)
        chosen = far.topk(math.ceil(changes * len(far))).indices
        if terms:
            rows, at = chosen // (self.shape[1] // dims), chosen % (self.shape[1] // dims)
            picked = [replace(term, bank=term.bank[rows], scale=term.scale[rows]) for term in terms.values()]
            found, _ = nearest(picked, wanted.reshape(-1, dims)[chosen], torch.eye(dims))
            for (prefix, term), codes in zip(terms.items(), found, strict=True):
                term.codes[rows, at] = codes
                self._write(prefix, packing.pack(term.codes.int(), term.encoding.bits, lanes=1))
        else:
            self._write("", self._rounded(wanted, chosen))

    def _rounded(self, wanted: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """The integers, of which the chosen ones are new."""
        encoding = self.encoding
        assert isinstance(encoding, Affine)
        zero = self.parts["zero"].unsqueeze(-1) if encoding.zero else None
        new = Steps(encoding, self.parts["scale"].unsqueeze(-1), zero, is_even(self)).codes(
            wanted.unflatten(-1, (-1, encoding.group or self.shape[-1]))
        )
        codes = packing.unpack(self.parts, encoding.width, self.shape[-1]).flatten()
        codes[chosen] = new.flatten()[chosen]
        return packing.pack(codes.view(self.shape), encoding.width)

    def _write(self, prefix: str, planes: Mapping[str, torch.Tensor]) -> None:
        for part, value in planes.items():
            self.parts[prefix + part].copy_(value)
