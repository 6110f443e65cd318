"""Kernels that treat every row alike: norms, rotary, activations and gated products, in C++.

Each works row by row in a fixed order, so that a token's result does not depend on how many others share the step.
All numbers are float32, positions int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from ..ir.errors import SmeltError
from ..ir.ops import GATED, HADAMARD, LAYER_NORM, QUANTIZED, RMS_NORM, ROTARY
from . import hadamard
from .rows_source import KERNELS, MATH
from .unit import Call, Function, call

Binder: TypeAlias = Callable[[Mapping[str, Any], torch.Tensor], Call]
aten = torch.ops.aten


@dataclass(frozen=True)
class RowKernel:
    """A row-wise kernel; `bind` fixes every address."""

    name: str
    source: str
    binder: Binder
    strided: tuple[str, ...] = ()  # arguments that need not be contiguous

    def bind(self, args: Mapping[str, Any], out: torch.Tensor) -> Call:
        """A call that writes `out`; the tensors of `args` have the addresses and strides that they will have then.

        Raises SmeltError for a tensor of another type, or of strides that the kernel does not take.
        """
        if bad := self.contiguous(args):
            raise SmeltError(f"{self.name}: '{bad[0]}' has strides {args[bad[0]].stride()}; bind a contiguous copy")
        for name, value in (*args.items(), ("out", out)):
            wanted = torch.int64 if name in ("ids", "positions") else torch.float32
            if isinstance(value, torch.Tensor) and value.dtype is not wanted:
                raise SmeltError(f"{self.name}: '{name}' is {value.dtype}, the kernel takes {wanted}")
        return self.binder(args, out)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of tensor arguments that must be copied to be contiguous first."""
        tensors = {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}
        return tuple(n for n, v in tensors.items() if not v.is_contiguous() and not self._takes(n, v))

    def _takes(self, name: str, value: torch.Tensor) -> bool:
        if name not in self.strided or value.stride(-1) != 1:
            return False
        return self.binder is _rotary or row_stride(value) >= 0


def row_kernel(target: Any) -> RowKernel | str:
    """The kernel of a row-wise op of the dialect or of ATen, or why there is none."""
    if target not in _KERNELS:
        return "no C++ template"
    name, binder, strided = _KERNELS[target]
    return RowKernel(f"rows.{name}", MATH + KERNELS, binder, strided)


def function(name: str) -> Function:
    """One of the functions of the row-wise kernels' text."""
    return Function(name, "", (MATH, KERNELS), f"rows.{name}")


def copied(x: torch.Tensor, out: torch.Tensor) -> Call | None:
    """A call that copies x of any strides to the contiguous `out` of its shape; None where no kernel does."""
    if {x.dtype, out.dtype} != {torch.float32} or x.dim() > 4:
        return None
    shape, steps = [1] * (4 - x.dim()) + list(x.shape), [0] * (4 - x.dim()) + list(x.stride())
    return call(function("copy"), x, out, *shape, *steps, writes=[out], work=2 * x.numel())


def picked(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> Call:
    """A call that copies x[b, index[b]] of a contiguous x [B, T, K] to out [B, 1, K]; any type."""
    (rows, tokens, width), size = x.shape, x.element_size()
    return call(function("pick"), x, index, out, rows, tokens, width * size, writes=[out], work=2 * out.numel())


def row_stride(x: torch.Tensor) -> int:
    """The step from row to row of a tensor whose rows are evenly spaced, or -1."""
    if x.stride(-1) != 1:
        return -1
    # a dim of one says nothing: torch may give it any stride
    dims = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(outer == size * step for (_, outer), (size, step) in pairwise(dims))
    return (dims[-1][1] if dims else x.shape[-1]) if even else -1


def _rows_of(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _rms_norm(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    x, numbers = args["x"], (float(args["eps"]), float(args["offset"]))
    words = (x, args["weight"], out, *_rows_of(x), *numbers)
    return call(function("rms_norm"), *words, writes=[out], work=2 * x.numel())


def _layer_norm(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    x = args["x"]
    words = (x, args["weight"], args["bias"], out, *_rows_of(x), float(args["eps"]))
    return call(function("layer_norm"), *words, writes=[out], work=3 * x.numel())


def _quantized(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    x, group, levels = args["x"], int(args["group"]) or args["x"].shape[-1], float(2 ** (int(args["bits"]) - 1) - 1)
    return call(function("round_rows"), x, out, *_rows_of(x), group, levels, writes=[out], work=4 * x.numel())


def _hadamard(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    return hadamard.bind(args, out, (MATH, KERNELS))


def _rotary(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    x, freq = args["x"], args["inv_freq"]
    (b, h, t, d), steps = x.shape, x.stride()[:3]
    positions = args["positions"].expand(b, t)
    sizes = (b, h, t, d, positions.stride(0), *steps, freq.shape[0], float(args["scale"]))
    return call(function("rotary"), x, positions, freq, out, *sizes, writes=[out], work=4 * x.numel())


def _gated(args: Mapping[str, Any], out: torch.Tensor) -> Call:
    gate, up = args["gate"], args["up"]
    if gate.shape != up.shape:
        raise SmeltError(f"rows.gated: gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    words = (gate, up, out, *_rows_of(gate), row_stride(gate), row_stride(up))
    return call(function(f"gated_{args['act']}"), *words, writes=[out], work=5 * gate.numel())


def _activation(act: str, args: Mapping[str, Any], out: torch.Tensor) -> Call:
    if args.get("approximate") == "tanh":
        act = "gelu_tanh"
    x = args["self"]
    x = x if x.dim() else x.view(1)
    words = (x, out, *_rows_of(x), row_stride(x))
    return call(function(f"apply_{act}"), *words, writes=[out], work=4 * x.numel())


_KERNELS: dict[Any, tuple[str, Binder, tuple[str, ...]]] = {
    RMS_NORM.target: ("rms_norm", _rms_norm, ()),
    LAYER_NORM.target: ("layer_norm", _layer_norm, ()),
    QUANTIZED.target: ("quantized", _quantized, ()),
    HADAMARD.target: ("hadamard", _hadamard, ()),
    ROTARY.target: ("rotary", _rotary, ("x", "positions")),
    GATED.target: ("gated", _gated, ("gate", "up")),
    # ATen computes these by vectors inside of a tensor and by scalars at its end, with other last bits
    aten.gelu.default: ("gelu", partial(_activation, "gelu"), ("self",)),
    aten.relu.default: ("relu", partial(_activation, "relu"), ("self",)),
    aten.sigmoid.default: ("sigmoid", partial(_activation, "sigmoid"), ("self",)),
    aten.silu.default: ("silu", partial(_activation, "silu"), ("self",)),
    aten.tanh.default: ("tanh", partial(_activation, "tanh"), ("self",)),
}
