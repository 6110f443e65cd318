"""A few entries of each row or column, listed: outliers beside a dense encoding, a fixed count that kernels can find.

GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (2024, arXiv 2403.05527)
and KVQuant (2024, arXiv 2401.18079) keep lists of pointers; a fixed count (ELL) needs none, and no balancing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from .base import Encoding, Parts, checked, stored_as
from .expr import Cast, Expr, Load, Scatter, k, n, number, renamed, slot, substitute

PICKS = ("extremes", "magnitude")
AXES = ("token", "channel")
INDEX = {"uint8": 256, "int16": 1 << 15}  # most entries that an index tells apart


@dataclass(frozen=True)
class Sparse(Encoding):
    """`count` entries of every row of `[..., N, K]`, or of every column (`axis="channel"`); the others are 0.

    `keep` below 1 is a fraction of the entries, from 1 on their number. `by="extremes"`: as many of the greatest as of
    the least values, at least one of each; `magnitude`: the greatest magnitudes, at least one. Beside an encoding whose
    groups run over tokens, the axis should be the channel: the outliers of a group are what widens its range.

    Parts: `index` (uint8 up to 256 entries, or int16) and `value` float16, both `[..., N, count]` or `[..., count, K]`,
    ascending. With `values` these are stored by another encoding, in its parts with `value_` before their names.
    """

    name: ClassVar[str] = "sparse"
    keep: float
    by: str = "extremes"
    axis: str = "token"
    index: str = "uint8"
    values: Encoding | None = None

    def __post_init__(self) -> None:
        keep = self.keep
        if isinstance(keep, bool) or not isinstance(keep, int | float) or keep <= 0 or (keep > 1 and keep != int(keep)):
            raise SmeltError(f"sparse: keep is a fraction of the entries below 1 or their number, not {keep!r}")
        if self.by not in PICKS:
            raise SmeltError(f"sparse: by must be extremes or magnitude, not {self.by!r}{nearest(str(self.by), PICKS)}")
        if self.by == "extremes" and keep >= 1 and keep % 2:
            raise SmeltError(f"sparse: by=extremes keeps as many greatest as least values: an even number, not {keep}")
        if self.axis not in AXES:
            raise SmeltError(f"sparse: axis must be token or channel, not {self.axis!r}{nearest(str(self.axis), AXES)}")
        if self.index not in INDEX:
            raise SmeltError(f"sparse: index must be uint8 or int16, not {self.index!r}")
        if self.values is not None and (not isinstance(self.values, Encoding) or self.values.calibrated):
            raise SmeltError(
                "sparse: values is an encoding without tables from data, such as {affine: {bits: 8, group: 0}}, not "
                f"{self.values}"
            )

    @property
    def closes(self) -> int:
        """The rows of a group of the values, where each row has some."""
        return 1 if self.values is None or self.axis == "channel" else self.values.closes

    @property
    def dim(self) -> int:
        """The dim along which entries are listed."""
        return -1 if self.axis == "token" else -2

    def count(self, length: Any) -> int:
        """Entries that are kept of so many."""
        if self.keep >= 1:
            return int(self.keep)
        if not isinstance(length, int | sympy.Integer):
            raise SmeltError(f"{self}: how many entries a fraction keeps is not known for any width; keep a number")
        if self.by == "extremes":
            return 2 * max(1, round(self.keep * int(length) / 2))
        return max(1, round(self.keep * int(length)))

    def places(self, x: torch.Tensor) -> torch.Tensor:
        """The entries to keep along `dim`, ascending."""
        length = x.shape[self.dim]
        count = self.count(length)
        if self.by == "magnitude":
            return x.abs().topk(count, self.dim).indices.sort(self.dim).values
        order = x.argsort(dim=self.dim, stable=True)
        ends = order.narrow(self.dim, 0, count // 2), order.narrow(self.dim, length - count // 2, count // 2)
        return torch.cat(ends, self.dim).sort(self.dim).values

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The extremes of each row or column."""
        return self.at(x, self.places(checked(self, x)))

    def at(self, x: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """The values at entries that were chosen elsewhere."""
        value, index = checked(self, x).gather(self.dim, places), places.to(getattr(torch, self.index)).contiguous()
        if self.values is None:
            return {"index": index, "value": stored_as(self, value, "value", "float16").contiguous()}
        return {"index": index, **{f"value_{part}": held for part, held in self.values.encode(value).items()}}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values in their places, zeros elsewhere."""
        if self.values is None:
            value = parts["value"].float()
        else:
            held = {part.removeprefix("value_"): held for part, held in parts.items()}
            value = self.values.decode(held, self._listed(shape))
        return torch.zeros(shape, device=value.device).scatter_(self.dim, parts["index"].long(), value).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """An index and a value for each entry that is kept."""
        listed = self._listed(shape)
        values = 16 * sympy.prod(listed) if self.values is None else self.values.stored_bits(listed)
        return 8 * int(getattr(torch, self.index).itemsize) * sympy.prod(listed) + values

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The listed values where the column, or the row, is theirs."""
        count = self.count(shape[self.dim])
        at = n * count + slot if self.axis == "token" else slot * sympy.sympify(shape[-1]) + k
        index, value = Cast("int32", Load("index", at, self.index)), number("value", at, "float16")
        if self.values is not None:
            own = self.values.expr(self._listed(shape))
            value = renamed(substitute(own, {k if self.axis == "token" else n: slot}), "value_")
        return Scatter(index, value, count, k if self.axis == "token" else n)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, more entries than an index tells apart, fewer than are kept, or values that do not fit."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        length = shape[self.dim]
        if length > INDEX[self.index]:
            wider = "; use index: int16" if self.index == "uint8" else ""
            return f"{self.index} does not tell the {length} entries of dim {self.dim} apart{wider}"
        if length < 1 or self.count(length) > length:
            return f"dim {self.dim} is {length}, less than the {self.count(max(1, length))} entries that are kept"
        reason = self.values.refuses(self._listed(shape)) if self.values is not None else None
        return f"its values, {self.values}: {reason}" if reason else None

    def _listed(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """The shape of the lists."""
        count = self.count(shape[self.dim])
        return (*shape[:-1], count) if self.axis == "token" else (*shape[:-2], count, shape[-1])
