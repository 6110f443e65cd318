"""Holds the inputs of a call to what the program takes: names, types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from .ir.errors import SmeltError
from .ir.program import Program
from .ir.shapes import derive


def check_inputs(program: Program, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs in the program's order, each of its type; raises SmeltError naming the input that does not fit.

    Integers of any width become the program's; a size that two inputs share must be the same in both.
    """
    if set(inputs) != set(program.inputs):
        raise SmeltError(
            f"{program.name} takes the inputs {', '.join(program.inputs)}, not {', '.join(inputs) or 'none'}"
        )
    places = {str(node.target): node for node in program.graph.nodes if node.op == "placeholder"}
    if any("shape" not in node.meta for node in places.values()):
        derive(program)
    sizes: dict[sympy.Symbol, int] = {}
    return {name: _checked(program, name, inputs[name], places[name].meta, sizes) for name in program.inputs}


def _checked(
    program: Program, name: str, value: Any, meta: Mapping[str, Any], sizes: dict[sympy.Symbol, int]
) -> torch.Tensor:
    place, wanted, dtype = f"{program.name}: input '{name}'", meta["shape"], meta["dtype"]
    if not isinstance(value, torch.Tensor):
        raise SmeltError(f"{place} must be a tensor, not {type(value).__name__}")
    shown = f"[{', '.join(map(str, wanted))}]"
    fits = value.dim() == len(wanted) and all(
        sizes.setdefault(size, given) == given if isinstance(size, sympy.Symbol) else size == given
        for size, given in zip(wanted, value.shape, strict=True)
    )
    if not fits or not value.numel():
        known = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
        raise SmeltError(f"{place} must be {shown}, not {list(value.shape)}{f' ({known})' if known else ''}")
    if value.dtype.is_floating_point != dtype.is_floating_point or value.dtype.is_complex:
        raise SmeltError(f"{place} must be {str(dtype).removeprefix('torch.')}, not {value.dtype}")
    return value.detach().to(dtype)
