"""Codes into a small table of numbers, with a scale and a zero: `x = table[q] * scale + zero`.

KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization (2024, arXiv 2401.18079): signposts
fitted to normalised values, ranges of key channels fixed by calibration, those of values taken online.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from . import packing, signposts
from .base import Encoding, Parts, checked, stored_as, table
from .expr import Bin, Expr, Take, k, n, number

WIDTHS = (2, 3, 4)
AXES = ("token", "channel")
KINDS = ("learned", "normal")
RANGES = ("online", "calibrated")
SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Nonuniform(Encoding):
    """The nearest of 2^bits signposts to `(x - zero) / scale`, on `[..., N, K]`.

    `kind="learned"`: signposts in [-1, 1] by weighted k-means, for scales that are half the span of a group and zeros
    in its middle (`fit`). `kind="normal"`: the values with the least error on a unit Gaussian, which need no data; the
    scale is the group's root mean square about the zero, and the zero its mean. Without `zero` the zero is 0, and the
    scale of learned signposts the greatest magnitude.

    A group is `group` neighbours of a row (`axis="token"`, 0: the row) or one column over `group` rows
    (`axis="channel"`). `range="calibrated"`: scale and zero are tables, one a column, from all rows that `fit` saw but
    the fraction `clip` with the greatest and least values. `qnorm`: the table is moved so that the stored samples have
    the mean and the deviation of the samples (Q-Norm).

    Parts: codes as of `Affine`, `scale` and `zero` unless calibrated. Tables: `table` float32 `[2^bits]`; calibrated
    `scale` and `zero` `[K]`; with `qnorm` also `signposts`, by which codes are chosen.
    """

    name: ClassVar[str] = "nonuniform"
    bits: int
    axis: str = "token"
    group: int = 0
    kind: str = "learned"
    range: str = "online"
    zero: bool = True
    clip: float = 0.0
    qnorm: bool = False
    scale: str = "float16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise SmeltError(f"nonuniform: bits must be one of 2, 3, 4, not {self.bits!r}")
        known = {"axis": AXES, "kind": KINDS, "range": RANGES, "scale": SCALES}
        for option, values in known.items():
            if (value := getattr(self, option)) not in values:
                hint = nearest(str(value), values)
                raise SmeltError(f"nonuniform: {option} must be one of {', '.join(values)}, not {value!r}{hint}")
        if type(self.group) is not int or self.group < 0:
            raise SmeltError(f"nonuniform: group must be a count of elements (0: the whole row), not {self.group!r}")
        if self.range == "calibrated" and (self.axis != "channel" or self.group):
            raise SmeltError("nonuniform: range=calibrated is one scale a channel: use axis: channel, and no group")
        if self.range == "online" and self.axis == "channel" and not self.group:
            raise SmeltError(
                "nonuniform: axis=channel needs a group of tokens (such as group: 64) or range: calibrated"
            )
        if not 0 <= self.clip < 1 or (self.clip and self.range == "online"):
            raise SmeltError(f"nonuniform: clip is a fraction below 1, of a calibrated range, not {self.clip!r}")
        if self.qnorm and self.kind == "normal":
            raise SmeltError(
                "nonuniform: qnorm moves learned signposts; those of kind=normal have the deviation they need"
            )
        for option in ("zero", "qnorm"):
            if type(getattr(self, option)) is not bool:
                raise SmeltError(f"nonuniform: {option} must be true or false, not {getattr(self, option)!r}")

    @property
    def calibrated(self) -> bool:
        """Unless signposts are those of a Gaussian and ranges come with the data."""
        return self.kind == "learned" or self.range == "calibrated"

    @property
    def closes(self) -> int:
        """The tokens of a group, by channel."""
        return max(self.group, 1) if self.axis == "channel" else 1

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Ranges of channels and signposts from x [..., N, K]; float32 k-means weighted by `weight`."""
        if not self.calibrated:
            return {"table": self._normal(x.device).expand(1, -1)}
        x, tables = checked(self, x), {}
        if self.range == "calibrated":
            scale, zero = self._clipped(x)
            tables = {"scale": scale} | ({"zero": zero} if self.zero else {})
            tables = {part: stored_as(self, value, part, self.scale) for part, value in tables.items()}
        if self.kind == "normal":
            return {**tables, "table": self._normal(x.device).expand(*x.shape[:-2], -1).clone()}
        unit, inside = self._unit(x, tables)
        if weight is not None:
            each = weight if weight.dim() == x.dim() else weight[..., None].expand(x.shape)
            inside = inside * each.reshape(x.shape)
        lead, count = x.shape[:-2], 2**self.bits
        rows = unit.reshape(-1, x.shape[-2] * x.shape[-1]), inside.reshape(-1, x.shape[-2] * x.shape[-1])
        values = [signposts.fitted(u, w, count).to(x.device) for u, w in zip(*rows, strict=True)]
        found = torch.stack(values).reshape(*lead, count)
        if not self.qnorm:
            return {**tables, "table": found}
        moved = [_matched(u, w, v) for u, w, v in zip(*rows, values, strict=True)]
        return {**tables, "table": torch.stack(moved).reshape(*lead, count), "signposts": found}

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """Codes, and scales (and zeros) where they come with the data."""
        x = checked(self, x)
        unit, parts = self._normalised(x, tables)
        values = self._table(tables, "signposts" if self.qnorm else "table", x.dim() - 2, x.device)
        codes = signposts.nearest(unit, values[..., None, None, :])
        return {**packing.pack(codes, self.bits), **parts}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`table[q] * scale + zero` in float32, then `dtype`."""
        codes = packing.unpack(parts, self.bits, shape[-1]).long()
        values = self._table(parts, "table", len(shape) - 2, codes.device)
        values = values.expand(*shape[:-2], values.shape[-1])
        held = values.gather(-1, codes.flatten(-2)).reshape(shape)
        scale, zero = self._stored(parts, shape)
        held = held * scale
        return (held + zero if zero is not None else held).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Codes, and scales (and zeros) unless they are tables."""
        count, bits = sympy.prod(shape), self.bits * sympy.prod(shape)
        if self.range == "online":
            bits += count / sympy.sympify(self.group or shape[-1]) * self._pair
        return sympy.expand(bits)

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Signposts and calibrated ranges of each leading entry."""
        ranges = shape[-1] * self._pair if self.range == "calibrated" else 0
        lead = sympy.prod(shape[:-2]) if self.calibrated else 1
        return sympy.expand(lead * (ranges + 32 * 2**self.bits * (2 if self.qnorm else 1)))

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`table[field of codes] * scale + zero`."""
        columns = sympy.sympify(shape[-1])
        if self.range == "calibrated":
            at: sympy.Expr = k
        elif self.axis == "channel":
            at = (n // self.group) * columns + k
        else:
            at = n * (columns // self.group) + k // self.group if self.group else n
        value: Expr = Take("table", 2**self.bits, packing.field(self.bits, columns, k), "float32")
        value = Bin("mul", value, number("scale", at, self.scale))
        return Bin("add", value, number("zero", at, self.scale)) if self.zero else value

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, a row that does not fill its packing blocks, or a dim that is no multiple of its group."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        block = packing.block(self.bits)
        if shape[-1] == 0 or shape[-1] % block:
            return f"the last dim, {shape[-1]}, must be a multiple of {block} ({self.bits}-bit packing)"
        dim = -1 if self.axis == "token" else -2
        if self.group and shape[dim] % self.group:
            return f"dim {dim} is {shape[dim]}, not a multiple of group={self.group}"
        return None

    @property
    def _pair(self) -> int:
        return 8 * int(getattr(torch, self.scale).itemsize) * (2 if self.zero else 1)

    def _normal(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(signposts.gaussian(2**self.bits), device=device)

    def _table(self, tables: Parts | None, name: str, lead: int, device: torch.device) -> torch.Tensor:
        """Signposts [..., 2^bits] over the leading dims; those of a Gaussian need not be given."""
        if self.kind == "normal" and (tables is None or name not in tables):
            return self._normal(device)
        return table(self, tables, name, 1, lead)

    def _grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """`x` with its groups along one dim of their own, and that dim."""
        dim = -1 if self.axis == "token" else -2
        size = self.group or x.shape[dim]
        return x.unflatten(dim, (x.shape[dim] // size, size)), dim

    def _range(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of groups along a dim, which stays with a length of 1."""
        if self.kind == "normal":
            zero = x.mean(dim, keepdim=True) if self.zero else torch.zeros_like(x.narrow(dim, 0, 1))
            return (x - zero).square().mean(dim, keepdim=True).sqrt(), zero
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        if self.zero:
            return (high - low) / 2, (high + low) / 2
        return torch.maximum(high, -low), torch.zeros_like(low)

    def _clipped(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero [..., K] of columns without their extremes."""
        gone = int(x.shape[-2] * self.clip / 2)
        inner = x.sort(-2).values[..., gone : x.shape[-2] - gone, :]
        scale, zero = self._range(inner, -2)
        return scale.squeeze(-2), zero.squeeze(-2)

    def _normalised(self, x: torch.Tensor, tables: Parts | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`(x - zero) / scale` by the numbers as stored, and those of them that are no tables."""
        if self.range == "calibrated":
            scale = table(self, tables, "scale", 1, x.dim() - 2)[..., None, :]
            zero = table(self, tables, "zero", 1, x.dim() - 2)[..., None, :] if self.zero else None
            return (x if zero is None else x - zero) / torch.where(scale == 0, 1.0, scale), {}
        groups, dim = self._grouped(x)
        found = dict(zip(("scale", "zero"), self._range(groups, dim), strict=True))
        parts = {part: stored_as(self, found[part], part, self.scale) for part in ("scale", "zero")[: 1 + self.zero]}
        scale = parts["scale"].float()
        above = groups - parts["zero"].float() if self.zero else groups
        unit = above / torch.where(scale == 0, 1.0, scale)
        return unit.reshape(x.shape), {part: value.squeeze(dim) for part, value in parts.items()}

    def _unit(self, x: torch.Tensor, tables: Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised samples, and 1 for those within a range that was clipped."""
        unit, _ = self._normalised(x, tables)
        return unit, (unit.abs() <= 1 + 1e-3).float() if self.clip else torch.ones_like(unit)

    def _stored(self, parts: Parts, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero, to broadcast against a tensor of that shape."""
        found: list[torch.Tensor | None] = []
        for part in ("scale", "zero")[: 1 + self.zero]:
            if self.range == "calibrated":
                found.append(table(self, parts, part, 1, len(shape) - 2)[..., None, :])
                continue
            dim = -1 if self.axis == "token" else -2
            value = parts[part].float()
            found.append(value.repeat_interleave(shape[dim] // value.shape[dim], dim))
        scale = found[0]
        assert scale is not None
        return scale, found[1] if self.zero else None


def _matched(x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values moved and stretched so that the stored samples have the mean and deviation of the samples."""
    total = weight.sum().clamp_min(1e-30)
    stored = values[signposts.nearest(x, values).long()]
    means = [(weight * each).sum() / total for each in (x, stored)]
    spreads = [((weight * (e - m).square()).sum() / total).sqrt() for e, m in zip((x, stored), means, strict=True)]
    stretch = spreads[0] / spreads[1] if float(spreads[1]) > 0 else 1.0
    return (values - means[1]) * stretch + means[0]
