"""From a checked ONNX model to a Program graph: its nodes run under torch.export, its tensors stay in the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ...errors import SmeltError
from ...program import Program
from ...weight import Weight
from ..exported import export, to_program
from .graph import Port
from .module import OnnxModule, is_small
from .stored import dtype_of

_PRIMES = (3, 7, 5, 11, 13, 17, 19, 23, 29)  # sizes that symbols are traced with: no two of them multiply to a width
MOST = 1 << 28  # elements of one tensor that a graph may compute at these sizes


@dataclass(frozen=True)
class Feed:
    """An input of the Program: its name, its type, and its shape with strings for symbols."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def sized(self, sizes: Mapping[str, int]) -> list[int]:
        """The shape with a number for each symbol."""
        return [sizes[d] if isinstance(d, str) else d for d in self.shape]


class _Traced(nn.Module):
    """An OnnxModule whose stored tensors are parameters that torch.export sees."""

    def __init__(self, module: OnnxModule, arrange: Callable[..., Sequence[Any]], outputs: Sequence[int]) -> None:
        super().__init__()
        # in a list, torch.export does not look for changes of its attributes
        self.holder, self.arrange, self.outputs = [module], arrange, tuple(outputs)
        self.names: dict[str, str] = {}
        for name, stored in module.model.graph.tensors.items():
            if stored.count <= 1 and name not in module.weights and is_small(stored):
                continue  # a number in the graph
            self.names[f"w{len(self.names)}"] = name
            self.register_buffer(f"w{len(self.names) - 1}", _placeholder(module, name))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (module,) = self.holder
        module.held = {name: getattr(self, buffer) for buffer, name in self.names.items()}
        found = module(*self.arrange(*inputs))
        return tuple(found[i] for i in self.outputs)


def _placeholder(module: OnnxModule, name: str) -> torch.Tensor:
    """Memory of a tensor's shape that nobody writes or reads, so that it costs none; floats are float32."""
    weight = module.weights.get(name)
    if weight is not None:
        return torch.empty(weight.shape)
    stored = module.model.graph.tensors[name]
    return torch.empty(stored.shape, dtype=torch.float32 if stored.dtype.is_floating_point else stored.dtype)


def trace(
    module: OnnxModule,
    feeds: Sequence[Feed],
    arrange: Callable[..., Sequence[Any]],
    outputs: Mapping[str, int],
    name: str,
) -> Program:
    """A Program of `module` over inputs `feeds`; `arrange` makes the file's inputs of them.

    `outputs` picks the file's outputs by index. Sizes that the graph ties down become numbers in `facts["inputs"]`.
    """
    sizes = example_sizes(feeds)
    example = tuple(torch.zeros(feed.sized(sizes), dtype=feed.dtype) for feed in feeds)
    shapes = tuple({i: Dim.AUTO for i, d in enumerate(feed.shape) if isinstance(d, str)} for feed in feeds)
    traced = _Traced(module, arrange, list(outputs.values()))
    try:
        exported = export(traced, example, (shapes,) if feeds else None, name)
    finally:
        module.held = {}
    stored = module.model.graph.tensors

    def weight(target: str) -> Weight:
        return module.weights[target] if target in module.weights else stored[target].weight()

    inputs = tuple(feed.name for feed in feeds)
    program = to_program(exported, name, inputs, tuple(outputs), weight, traced.names)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    program.facts["inputs"] = {
        feed.name: {"shape": _shape(feed, node.meta["val"]), "dtype": str(feed.dtype).removeprefix("torch.")}
        for feed, node in zip(feeds, placeholders, strict=True)
    }
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(_is_open(size) for size in value.shape):
            raise SmeltError(f"{name}: '{node.name}' has a shape that depends on values, which cannot be captured")
        if isinstance(value, torch.Tensor) and _hint(value) > MOST:
            raise SmeltError(f"{name}: '{node.name}' computes a tensor of {_hint(value)} elements from small inputs")
    return program


def example_sizes(feeds: Sequence[Feed]) -> dict[str, int]:
    """A size for each symbol, all different."""
    symbols = list(dict.fromkeys(d for feed in feeds for d in feed.shape if isinstance(d, str)))
    if len(symbols) > len(_PRIMES):
        raise SmeltError(f"inputs have {len(symbols)} symbolic sizes; at most {len(_PRIMES)} can be told apart")
    return dict(zip(symbols, _PRIMES, strict=False))


def feeds_of(ports: Sequence[Port], where: str) -> list[Feed]:
    """The inputs of a file as inputs of a Program.

    The first symbol of the first input is the batch B, the second of an integer matrix is T; others keep their names.
    """
    names: dict[str, str] = {}
    found = []
    for port in ports:
        if port.kind == 0 or port.shape is None:
            what = "is a sequence, map or optional" if port.kind == 0 else "has no declared rank"
            raise SmeltError(f"{where}: the input '{port.name}' {what}, which cannot be captured yet")
        dtype = dtype_of(port.kind, f"{where}: input '{port.name}'")
        dims = [d if d is not None else f"{port.name}.{i}" for i, d in enumerate(port.shape)]
        shape: list[int | str] = []
        for i, d in enumerate(dims):
            if isinstance(d, str) and d not in names:
                names[d] = _symbol(d, i, len(dims), dtype, set(names.values()))
            shape.append(names[d] if isinstance(d, str) else d)
        if math.prod(d for d in shape if isinstance(d, int)) > MOST:
            raise SmeltError(f"{where}: the input '{port.name}' has {shape} elements, more than any model reads")
        if any(d == 0 for d in shape):
            raise SmeltError(f"{where}: the input '{port.name}' has a size of 0 in its shape {shape}")
        found.append(Feed(port.name, torch.float32 if dtype.is_floating_point else dtype, tuple(shape)))
    return found


def _symbol(name: str, axis: int, rank: int, dtype: torch.dtype, taken: set[str]) -> str:
    if axis == 0 and "B" not in taken:
        return "B"
    if axis == 1 and rank == 2 and not dtype.is_floating_point and "T" not in taken:
        return "T"
    clean = "".join(c if c.isalnum() else "_" for c in name)
    return clean if clean and clean not in taken and clean[0].isalpha() else f"n{len(taken)}"


def _shape(feed: Feed, value: torch.Tensor) -> list[int | str]:
    """The feed's shape, with numbers where the graph holds for one size only."""
    pairs = zip(feed.shape, value.shape, strict=True)
    return [d if isinstance(d, str) and isinstance(size, torch.SymInt) else int(size) for d, size in pairs]


def _is_open(size: Any) -> bool:
    """No input's size determines it."""
    return isinstance(size, torch.SymInt) and size.node.hint is None


def _hint(value: torch.Tensor) -> int:
    count = 1
    for size in value.shape:
        known = size.node.hint if isinstance(size, torch.SymInt) else size
        count *= 1 if known is None else int(known)  # a size that only a run tells has no example
    return count
