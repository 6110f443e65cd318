"""Kernels that treat every row alike: norms, rotary, activations and gated products, in C++.

Each works row by row in a fixed order, so that a token's result does not depend on how many others share the step.
All numbers are float32, positions int64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from ..ir.errors import SmeltError
from ..ir.ops import GATED, LAYER_NORM, RMS_NORM, ROTARY
from .build import build, threads
from .plan import Run
from .rows_source import SOURCE

Binder: TypeAlias = Callable[[ctypes.CDLL, Mapping[str, Any], torch.Tensor], Run]
aten = torch.ops.aten


@dataclass(frozen=True)
class RowKernel:
    """A row-wise kernel; `bind` builds it (or finds it built) and fixes every address."""

    name: str
    source: str
    binder: Binder
    strided: tuple[str, ...] = ()  # arguments that need not be contiguous

    def bind(self, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """A call that writes `out`; the tensors of `args` have the addresses and strides that they will have then.

        Raises SmeltError for a tensor of another type, or of strides that the kernel does not take.
        """
        if bad := self.contiguous(args):
            raise SmeltError(f"{self.name}: '{bad[0]}' has strides {args[bad[0]].stride()}; bind a contiguous copy")
        for name, value in (*args.items(), ("out", out)):
            wanted = torch.int64 if name in ("ids", "positions") else torch.float32
            if isinstance(value, torch.Tensor) and value.dtype is not wanted:
                raise SmeltError(f"{self.name}: '{name}' is {value.dtype}, the kernel takes {wanted}")
        return self.binder(self._library, args, out)

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return build(self.source, self.name.split(".")[0])  # kernels of one source share one build

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
    return RowKernel(f"rows.{name}", SOURCE, binder, strided)


def call(function: Any, *args: Any) -> Run:
    """A call with fixed arguments: ints as int64, floats as float, tensors by address (None: null); all kept alive."""
    function.restype = None
    run = partial(function, *fixed(args))
    run.keeps = args  # type: ignore[attr-defined]  # the addresses are only valid while the tensors live
    return run


def fixed(args: tuple[Any, ...]) -> list[Any]:
    """Arguments as ctypes values."""
    return [
        ctypes.c_void_p(a if a is None else a.data_ptr())
        if a is None or isinstance(a, torch.Tensor)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in args
    ]


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


def _rms_norm(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x, numbers = args["x"], (float(args["eps"]), float(args["offset"]))
    return call(library.rms_norm, x, args["weight"], out, *_rows_of(x), *numbers, threads())


def _layer_norm(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x = args["x"]
    return call(library.layer_norm, x, args["weight"], args["bias"], out, *_rows_of(x), float(args["eps"]), threads())


def _rotary(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x, freq = args["x"], args["inv_freq"]
    (b, h, t, d), steps = x.shape, x.stride()[:3]
    positions = args["positions"].expand(b, t)
    sizes = (b, h, t, d, positions.stride(0), *steps, freq.shape[0])
    return call(library.rotary, x, positions, freq, out, *sizes, float(args["scale"]), threads())


def _gated(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    gate, up = args["gate"], args["up"]
    if gate.shape != up.shape:
        raise SmeltError(f"rows.gated: gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    function = getattr(library, f"gated_{args['act']}")
    return call(function, gate, up, out, *_rows_of(gate), row_stride(gate), row_stride(up), threads())


def _activation(act: str, library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    if args.get("approximate") == "tanh":
        act = "gelu_tanh"
    x = args["self"]
    x = x if x.dim() else x.view(1)
    return call(getattr(library, f"apply_{act}"), x, out, *_rows_of(x), row_stride(x), threads())


_KERNELS: dict[Any, tuple[str, Binder, tuple[str, ...]]] = {
    RMS_NORM.target: ("rms_norm", _rms_norm, ()),
    LAYER_NORM.target: ("layer_norm", _layer_norm, ()),
    ROTARY.target: ("rotary", _rotary, ("x", "positions")),
    GATED.target: ("gated", _gated, ("gate", "up")),
    # ATen computes these by vectors inside of a tensor and by scalars at its end, with other last bits
    aten.gelu.default: ("gelu", partial(_activation, "gelu"), ("self",)),
    aten.relu.default: ("relu", partial(_activation, "relu"), ("self",)),
    aten.sigmoid.default: ("sigmoid", partial(_activation, "sigmoid"), ("self",)),
    aten.silu.default: ("silu", partial(_activation, "silu"), ("self",)),
    aten.tanh.default: ("tanh", partial(_activation, "tanh"), ("self",)),
}
