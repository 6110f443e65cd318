"""Weights that learn: vectors and dense matrices as they are, encoded ones by scales and tables, or through codes.

Integers learn by the straight-through estimator: the loss sees the rounded weight, its gradient moves the weight that
is rounded. With the scale learning too, its gradient is that of Learned Step Size Quantization (Esser et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch

from ...ir.encoding import Affine, Codebook, Dense, Encoding, LowRank, Sum
from ...ir.ops import LAYER_NORM, LINEAR, RMS_NORM, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..weights._matrices import matrices
from ..weights._range import Steps, is_even
from ._partial import Partial, partial

Kind = Literal["norms", "scales", "codes", "dense"]


class Relative(Mapping[str, torch.Tensor]):
    """Parts of which some learn: leaves in units of about their own size, so that one learning rate serves all."""

    def __init__(self, parts: Mapping[str, torch.Tensor], learn: Iterable[str]) -> None:
        self._parts = dict(parts)
        self._sizes = {part: _size(parts[part]) for part in learn}
        self.leaves = {
            part: (parts[part].float() / size).clone().requires_grad_() for part, size in self._sizes.items()
        }

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.leaves[part] * self._sizes[part] if part in self.leaves else self._parts[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


@dataclass(frozen=True, eq=False)
class Through(Weight):
    """An `Affine` weight whose parts are `data`, what is rounded, and `scale` (and `zero`), float32.

    even: its codes are, as `Steps` has it.
    """

    even: bool = False

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rounded values, through which gradients reach what is rounded and its scale."""
        assert isinstance(self.encoding, Affine)
        groups = self.parts["data"].unflatten(-1, (-1, self.encoding.group or self.shape[-1]))
        scale, zero = self.parts["scale"].unsqueeze(-1), self.parts.get("zero")
        half: int = 2 ** (self.encoding.width - 1)
        low, high = (self.even - half, half - 1) if zero is None else (0, 2 * half - 1)
        divisor = torch.where(scale == 0, 1.0, scale)
        base = groups if zero is None else groups - zero.unsqueeze(-1)
        exact = (base / divisor).clamp(low, high)
        codes = exact + (exact.round() - exact).detach()
        out: torch.Tensor = codes * scale if zero is None else codes * scale + zero.unsqueeze(-1)
        return out.reshape(self.shape).to(dtype)


@dataclass
class Learned:
    """The leaves that learn, by `weight/part`, and a fork of the program with the `weights` that read them.

    Codes that change a few at a time, `changes` of a matrix, are among the leaves; they ask for no gradients.
    """

    part: Program
    changes: float = 1.0
    weights: dict[str, Weight] = field(default_factory=dict)
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        program: Program,
        kinds: tuple[Kind, ...],
        source: Mapping[str, Weight] = MappingProxyType({}),
        changes: float = 1.0,
    ) -> Learned:
        """Of a fork of the program; its other weights are decoded once.

        source: weights as they were before they were rounded: what is rounded while codes learn begins there, where
        that is what was rounded, and as near to it as the codes allow. changes: share of a matrix's codes that may
        change in an update.
        """
        made = cls(program.fork(), changes)
        whole = {name for name, how in matrices(program).items() if not isinstance(how, str)}
        for name, weight in program.weights.items():
            dense = "dense" if name in whole else "norms" if _beside(program, name) else None
            made.weights[name] = made._weight(name, weight, dense in kinds, kinds, source.get(name))
        made.part.weights = dict(made.weights)
        return made

    def stored(self, old: Mapping[str, Weight]) -> dict[str, Weight]:
        """What was learned, each in the encoding and the types that it had."""
        names = dict.fromkeys(leaf.rpartition("/")[0] for leaf in self.leaves)
        return {name: _stored(old[name], self.weights[name]) for name in names}

    def settle(self) -> None:
        """End an update: codes that change a few at a time do."""
        for weight in self.weights.values():
            if isinstance(weight, Partial):
                weight.settle(self.changes)

    def _weight(
        self, name: str, weight: Weight, learns: bool, kinds: tuple[Kind, ...], source: Weight | None
    ) -> Weight:
        encoding, parts = weight.encoding, weight.parts
        numbers = [part for part, value in parts.items() if value.is_floating_point()] if "scales" in kinds else []
        if isinstance(encoding, Dense):
            held = {"data": weight.dense()}
            return replace(Weight.of(held["data"]), parts=self._parts(name, held, ["data"] if learns else []))
        if "codes" in kinds and partial(encoding, self.changes):
            own = {part: value.clone() for part, value in parts.items()}  # whose codes change in place
            value = _before(weight, source) if isinstance(encoding, Affine) else None
            made = Partial.begun(weight, self._parts(name, own, numbers), _size(weight.dense()), value)
            self.leaves |= {f"{name}/{part}": value for part, value in made.state.items()}
            return made
        if isinstance(encoding, Affine) and "codes" in kinds:
            held = {part: value.float() for part, value in parts.items() if part in ("scale", "zero")}
            held["data"] = _before(weight, source)
            return Through(weight.shape, encoding, self._parts(name, held, ["data", *numbers]), is_even(weight))
        if isinstance(encoding, Affine) or _tabled(encoding):
            return Weight(weight.shape, encoding, self._parts(name, parts, numbers))
        return Weight.of(weight.dense())

    def _parts(self, name: str, parts: Mapping[str, torch.Tensor], learn: list[str]) -> Mapping[str, torch.Tensor]:
        if not learn:
            return parts
        made = Relative(parts, learn)
        self.leaves |= {f"{name}/{part}": leaf for part, leaf in made.leaves.items()}
        return made


def _size(value: torch.Tensor) -> float:
    """The power of 2 that is nearest to the root mean square, so that nothing is rounded."""
    found = float(value.float().square().mean().sqrt())
    return 2.0 ** round(math.log2(found)) if found else 1.0


def _beside(program: Program, name: str) -> bool:
    """Whether a weight is a gain or a bias of norms and products, and nothing else."""
    users = program.uses(name)
    vector = len(program.weights[name].shape) == 1 and bool(users)
    return vector and all(is_op(user, RMS_NORM, LAYER_NORM, LINEAR) for user in users)


def _tabled(encoding: Encoding) -> bool:
    """Whether an encoding's codes are numbers of entries, or a sum of such, integers and thin products."""
    terms = encoding.terms if isinstance(encoding, Sum) else (encoding,)
    return all(isinstance(term, Codebook | Affine | LowRank) for term in terms) and not isinstance(encoding, Affine)


def _before(weight: Weight, source: Weight | None) -> torch.Tensor:
    """Values that round to an `Affine` weight's codes: those of the source where they do, else the nearest to them."""
    rounded = weight.dense()
    if source is None or source.shape != weight.shape:
        return rounded
    value = source.dense()
    if (value - rounded).square().sum() > rounded.square().sum():  # turned or scaled in the meantime
        return rounded
    scale = weight.parts["scale"].float().unsqueeze(-1)
    reach = (0.499 * scale.abs()).expand(*scale.shape[:-1], rounded.numel() // scale.numel()).reshape(rounded.shape)
    return torch.clamp(value, rounded - reach, rounded + reach)


@torch.no_grad()
def _stored(old: Weight, new: Weight) -> Weight:
    if isinstance(old.encoding, Dense):
        return replace(old, parts=old.encoding.encode(new.dense()))
    if not isinstance(new, Through):
        kinds = {part: value.dtype for part, value in old.parts.items()}
        return replace(old, parts={part: new.parts[part].detach().to(kind) for part, kind in kinds.items()})
    assert isinstance(old.encoding, Affine)
    held = {part: new.parts[part].detach().to(old.parts[part].dtype) for part in ("scale", "zero") if part in old.parts}
    groups = new.parts["data"].detach().unflatten(-1, (-1, old.encoding.group or old.shape[-1]))
    wide = {part: value.unsqueeze(-1) for part, value in held.items()}
    codes = Steps(old.encoding, wide["scale"], wide.get("zero"), new.even).codes(groups).reshape(old.shape)
    return replace(old, parts=old.encoding.parts(codes, **held))
