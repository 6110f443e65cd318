"""A matrix product by itself: `y[M, N] = x[M, K] @ W[N, K]^T (+ bias[N])` with W in any encoding that is covered."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import stored as stored_parts
from ..ir.errors import SmeltError
from . import choose, interleave, loops, product, walk
from .memo import remembered
from .product import Spec
from .unit import Call, Unit, call

_ROWS, _X, _OUT, _BIAS = 1, 3, choose.OUT, -2  # words that a call sets


def covers(encoding: Encoding, shape: tuple[int, ...], width: int | None = None) -> str | None:
    """Why there is no kernel for a weight of that encoding and shape, or None; `width` as in `Spec`."""
    if len(shape) != 2:
        return f"needs a weight [N, K], not {list(shape)}"
    if reason := encoding.refuses(shape):
        return reason
    if width is not None and shape[1] % width:
        return f"rows of {shape[1]} are no multiple of the {width} activations of a group"
    return _verdict(encoding, width) or None


@functools.cache
def _verdict(encoding: Encoding, width: int | None) -> str:
    """Why no loop reads the encoding, or nothing."""

    def answer() -> str:
        try:
            inner = loops.floats(encoding) if width is None else loops.integers(encoding, width)
        except SmeltError as error:  # its value is no expression
            return str(error)
        return inner if isinstance(inner, str) else ""

    return remembered(f"covers {width}", encoding, answer)


def source(encoding: Encoding) -> str:
    """The C++ of the kernel, or SmeltError with the reason why there is none."""
    return product.function(_spec(encoding, False), name(encoding)).source


def name(encoding: Encoding) -> str:
    """`gemv.affine4.g64`: the encoding with its bits, and its other options where they are not the default."""
    (kind, options), defaults = next(iter(encoding.form.spec().items())), inspect.signature(type(encoding)).parameters
    words = [kind + str(options.get("bits", ""))]
    for option, value in options.items():
        if option == "bits" or value == defaults[option].default:
            continue
        inner = getattr(encoding, option, None)
        if isinstance(inner, Encoding):
            words.append(name(inner).removeprefix("gemv."))
        else:
            words.append(option if value is True else value if isinstance(value, str) else f"{option[0]}{value}")
    return ".".join(["gemv", *words])


def _spec(encoding: Encoding, bias: bool) -> Spec:
    return Spec(encoding, value="(v0 + o0)", operands=(False,)) if bias else Spec(encoding)


@dataclass(frozen=True)
class Gemv:
    """The kernel of one encoding; `bind` gives it a weight."""

    encoding: Encoding

    def bind(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Bound:
        """The kernel over a weight's parts, of which it keeps a copy in its own layout.

        Raises SmeltError where the encoding or shape is not covered, or a part is not on the CPU, or of a wrong type or
        size.
        """
        if reason := covers(self.encoding, shape):
            raise SmeltError(f"gemv does not cover {self.encoding} of shape {list(shape)}: {reason}")
        stored = walk.walked(self.encoding) or stored_parts(self.encoding.expr((None, loops.K)))
        for part, dtype in stored.items():
            tensor = parts[part]
            if str(tensor.dtype) != f"torch.{dtype}" or tensor.device.type != "cpu":
                raise SmeltError(f"gemv: part '{part}' is {tensor.dtype} on {tensor.device}, not {dtype} on cpu")
        nbytes = sum(parts[part].numel() * parts[part].itemsize for part in stored)
        wanted = self.encoding.stored_bits(shape) + self.encoding.table_bits(shape)
        if 8 * nbytes != wanted:
            raise SmeltError(
                f"gemv: the parts hold {8 * nbytes} bits, {self.encoding} of shape {list(shape)} has {wanted}"
            )
        packed = product.pack(self.encoding, parts, shape[0], _contiguous)
        return Bound(self.encoding, shape, nbytes, packed)


def _contiguous(part: torch.Tensor) -> torch.Tensor:
    return part.clone(memory_format=torch.contiguous_format)


class Bound:
    """A kernel with its weight; a call writes `out` and allocates nothing once it was made."""

    def __init__(
        self, encoding: Encoding, shape: tuple[int, ...], nbytes: int, packed: Mapping[str, torch.Tensor]
    ) -> None:
        self.name, self.shape, self.nbytes = name(encoding), shape, nbytes
        self._encoding, self._packed = encoding, packed
        self._n, self._k = shape
        self._calls: dict[bool, tuple[Call, Unit]] = {}

    def __call__(self, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`out[M, N] = x[M, K] @ W^T + bias`; all float32 and contiguous. Raises SmeltError on anything else."""
        rows = x.numel() // self._k
        if (
            x.dtype is not torch.float32
            or out.dtype is not torch.float32
            or not x.is_contiguous()
            or not out.is_contiguous()
            or rows * self._k != x.numel()
            or rows * self._n != out.numel()
        ):
            raise SmeltError(
                f"{self.name}: needs contiguous float32 x [M, {self._k}] and out [M, {self._n}], not "
                f"{x.dtype} {list(x.shape)} and {out.dtype} {list(out.shape)}"
            )
        if bias is not None and (
            bias.dtype is not torch.float32 or bias.numel() != self._n or not bias.is_contiguous()
        ):
            raise SmeltError(f"{self.name}: needs a contiguous float32 bias [{self._n}], not {bias.dtype}")
        made, unit = self._made(bias is not None)
        made.words[_ROWS], made.words[_X], made.words[_OUT] = rows, x.data_ptr(), out.data_ptr()
        if bias is not None:
            made.words[_BIAS] = bias.data_ptr()
        unit()

    def _made(self, bias: bool) -> tuple[Call, Unit]:
        if bias not in self._calls:
            tiles = -(-self._n // interleave.ROWS)
            units = -(-tiles // product.SINGLE)
            words = [1, self._k, None, None, None, product.SINGLE, units, 0, units, self._n, None, self._n]
            for part in self._packed.values():
                words += [part, part.shape[1] if part.dim() > 2 else 0]  # type: ignore[list-item]
            words += [None, 0] if bias else []
            function = product.function(_spec(self._encoding, bias), self.name)
            made = call(function, *words, writes=[])
            self._calls[bias] = made, Unit([made])
        return self._calls[bias]
