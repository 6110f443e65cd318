"""Integer codes with a scale, and optionally a zero, per group: `x = q * scale`, or `x = q * scale + zero`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from . import packing
from .base import Encoding, Parts, stored_as
from .expr import Bin, Cast, Const, Expr, k, n, number

WIDTHS = (2, 3, 4, 5, 6, 8)
AXES = ("token", "channel")
SCALES = ("float16", "bfloat16", "float32")
PIECE = 1 << 22  # elements encoded at once: the temporaries of a vocabulary's table would dwarf its codes


@dataclass(frozen=True, init=False)
class Affine(Encoding):
    """Round-to-nearest codes of `bits` bits on `[..., N, K]`.

    `axis="token"`: a group is `group` neighbours in one row (weights: inputs of one output; values: channels of one
    token), `group=0` the whole row. `axis="channel"`: a group is one column over `group` rows (keys: one channel over
    tokens). Symmetric codes span -2^(b-1) .. 2^(b-1)-1, of which `encode` leaves out the lowest, and are stored with
    offset 2^(b-1); with `zero` they span 0 .. 2^b-1 above the group's stored minimum. A scale may be negative, and is
    rounded to its dtype before the codes are chosen.

    Parts: `codes` uint8 `[..., N, K*bits/8]`, packed along the last dim (see `packing`; of 3, 5 and 6 bits the lower
    two or four, the others in `high`); `scale` (and `zero`) `[..., N, K/group]` or `[..., N/group, K]`.
    """

    name: ClassVar[str] = "affine"
    width: int  # `bits` in a spec
    group: int
    axis: str
    zero: bool
    scale: str

    def __init__(self, bits: int, group: int, axis: str = "token", zero: bool = False, scale: str = "float16") -> None:
        for field, value in (("width", bits), ("group", group), ("axis", axis), ("zero", zero), ("scale", scale)):
            object.__setattr__(self, field, value)
        if type(bits) is not int or bits not in WIDTHS:
            raise SmeltError(f"affine: bits must be one of {', '.join(map(str, WIDTHS))}, not {bits!r}")
        if type(group) is not int or group < 0:
            raise SmeltError(f"affine: group must be a count of elements (0: the whole row), not {group!r}")
        if axis not in AXES:
            raise SmeltError(f"affine: axis must be token or channel, not {axis!r}{nearest(str(axis), AXES)}")
        if axis == "channel" and group == 0:
            raise SmeltError("affine: axis=channel needs a group of tokens (such as group: 64), not 0")
        if type(zero) is not bool:
            raise SmeltError(f"affine: zero must be true or false, not {zero!r}")
        if scale not in SCALES:
            raise SmeltError(f"affine: scale must be one of {', '.join(SCALES)}, not {scale!r}")

    def spec(self) -> dict[str, dict[str, Any]]:
        """The recipe form, with the width of a code as `bits`."""
        options = super().spec()[self.name]
        return {self.name: {"bits": options.pop("width"), **options}}

    def _options(self) -> dict[str, Any]:
        return self.spec()[self.name]

    @property
    def block(self) -> int:
        """Columns that are packed together; K must be a multiple."""
        return packing.block(self.width)

    @property
    def planes(self) -> int:
        """In how many parts the bits of a code lie."""
        return len(packing.widths(self.width))

    @property
    def closes(self) -> int:
        """The tokens of a group, by channel."""
        return self.group if self.axis == "channel" else 1

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """Codes and scales of `x [..., N, K]`; values are read as float32. Large matrices go by pieces of rows."""
        if reason := self.refuses(tuple(x.shape)):
            raise SmeltError(f"{self}: {reason}")
        if self.axis == "token" and x.dim() == 2 and x.numel() > PIECE:
            pieces = [self._encode(rows) for rows in x.split(max(1, PIECE // x.shape[1]))]
            return {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]}
        return self._encode(x)

    def _encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        groups, dim = self._grouped(x.float())
        low, high = groups.amin(dim, keepdim=True), groups.amax(dim, keepdim=True)
        if self.zero:
            levels, offset = 2**self.width - 1, 0
            zero = self._stored(low, "zero")
            scale = self.step((high - zero.float()).clamp_min(0), levels)
            parts = {"zero": zero.squeeze(dim)}
            codes = groups - zero.float()
        else:
            levels, offset = 2 ** (self.width - 1) - 1, 2 ** (self.width - 1)
            scale = self.step(torch.maximum(high, -low), levels)
            parts = {}
            codes = groups.clone()
        # where the scale is 0 the whole group is 0 above its zero, and so are its codes
        divisor = torch.where(scale == 0, 1.0, scale.float())
        codes = codes.div_(divisor).round_().clamp_(0 if self.zero else -levels, levels).add_(offset)
        packed = packing.pack(codes.to(torch.uint8).reshape(x.shape), self.width)
        made = {**packed, "scale": scale.squeeze(dim), **parts}
        return {part: value.contiguous() for part, value in made.items()}

    def parts(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Parts of codes that were chosen elsewhere: uint8 `[..., N, K]` below 2^bits, scales and zeros as stored."""
        held = {**packing.pack(codes, self.width), "scale": scale}
        return held if zero is None else {**held, "zero": zero}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`q * scale` or `q * scale + zero` in float32, then `dtype`."""
        codes = packing.unpack(parts, self.width, shape[-1]).float()
        if not self.zero:
            codes -= 2 ** (self.width - 1)
        groups, dim = self._grouped(codes)
        groups *= parts["scale"].float().unsqueeze(dim)
        if self.zero:
            groups += parts["zero"].float().unsqueeze(dim)
        return groups.reshape(shape).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Codes plus scales (and zeros)."""
        count = sympy.prod(shape)
        per_group = 8 * int(getattr(torch, self.scale).itemsize) * (2 if self.zero else 1)
        return sympy.expand(count * self.width + count / sympy.sympify(self._group(shape)) * per_group)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`(field of codes - offset) * scale`, or `field of codes * scale + zero`."""
        columns = sympy.sympify(shape[-1])
        code = packing.field(self.width, columns, k)
        if self.axis == "channel":
            at = (n // self.group) * columns + k
        else:
            at = n * (columns // self.group) + k // self.group if self.group else n
        scale = number("scale", at, self.scale)
        if self.zero:
            return Bin("add", Bin("mul", Cast("float32", code), scale), number("zero", at, self.scale))
        return Bin("mul", Cast("float32", Bin("sub", code, Const(2 ** (self.width - 1), "int32"))), scale)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, a row that does not fill its packing blocks, or a dim that is no multiple of its group."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if shape[-1] == 0 or shape[-1] % self.block:
            return f"the last dim, {shape[-1]}, must be a multiple of {self.block} ({self.width}-bit packing)"
        dim = -1 if self.axis == "token" else -2
        if shape[dim] % self._group(shape):
            return f"dim {dim} is {shape[dim]}, not a multiple of group={self.group}"
        return None

    def _group(self, shape: tuple[Any, ...]) -> Any:
        return self.group or shape[-1]

    def _grouped(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """`x` with its groups along one dim of their own, and that dim."""
        if self.axis == "token":
            return x.unflatten(-1, (x.shape[-1] // self._group(tuple(x.shape)), self._group(tuple(x.shape)))), -1
        return x.unflatten(-2, (x.shape[-2] // self.group, self.group)), -2

    def _stored(self, value: torch.Tensor, part: str) -> torch.Tensor:
        """The value in the storage dtype of scales; refuses what that dtype cannot hold."""
        return stored_as(self, value, part, self.scale)

    def step(self, span: torch.Tensor, levels: int) -> torch.Tensor:
        """`span / levels` in the storage dtype, never rounded to 0 nor far below the span.

        Among the subnormals of the dtype rounding down would clip the largest values by more than half a step, so
        there the scale is the next one up.
        """
        scale = self._stored(span / levels, "scale")
        info = torch.finfo(scale.dtype)
        short = (scale.float() * levels < span) & (scale < info.smallest_normal)
        return torch.where(short, scale + info.smallest_normal * info.eps, scale)
