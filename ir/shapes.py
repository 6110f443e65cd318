"""Derives the shape and type of every node in symbols (B batch, T new tokens), by running the graph on fake tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .encoding.dense import DTYPES
from .errors import SmeltError
from .program import Program
from .weight import Weight

# A symbol stands for any size, but torch traces with one in mind and takes the branches that it takes. Primes that no
# model uses as a width: B and T small, because positions index tables; the rest large, because images shrink.
_EXAMPLES = {"B": 11, "T": 13}
_MORE_EXAMPLES = (67, 71, 73, 79, 83, 89)


def symbol(name: str) -> sympy.Symbol:
    """The size called `name`: B batch, T new tokens, S context before them; one positive integer everywhere."""
    return sympy.Symbol(name, integer=True, positive=True)


def derive(program: Program) -> None:
    """Set `meta["shape"]` (ints and sympy expressions) and `meta["dtype"]` on every node but the output.

    A node with several results gets tuples of both. A size has shape () and its expression in `meta["value"]`.
    Weights of floating types count as float32, as `Weight.dense` decodes them. Raises SmeltError naming the node whose
    arguments do not fit, or that holds for one size of a symbol only. A computation that was derived lately is known.
    """
    inputs = {name: _described(program, name) for name in program.inputs}
    key = _signature(program, inputs)
    found = _known.pop(key, None) or _derived(program, inputs)
    _known[key] = found  # the last of them
    if len(_known) > KNOWN:
        del _known[next(iter(_known))]
    for node, meta in zip(program.graph.nodes, found, strict=False):  # all but the output
        node.meta.pop("value", None)
        node.meta.update(meta)


Inputs: TypeAlias = dict[str, tuple[tuple[int | str, ...], torch.dtype]]
Metas: TypeAlias = list[dict[str, Any]]

KNOWN = 32  # computations
_known: dict[Hashable, Metas] = {}  # by signature, those asked for lately at the end


def _signature(program: Program, inputs: Inputs) -> Hashable:
    """What decides all shapes: the calls with their arguments, and shapes and types of inputs and weights."""
    places = {node: place for place, node in enumerate(program.graph.nodes)}

    def plain(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", places[value]
        if isinstance(value, Mapping):
            return "map", *((name, plain(each)) for name, each in value.items())
        if isinstance(value, list | tuple):
            return "list", *map(plain, value)
        return type(value).__name__, value if isinstance(value, Hashable) else repr(value)

    def told(node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return node.op, inputs[str(node.target)]
        weight = program.weights.get(str(node.target)) if node.op == "get_attr" else None
        if weight is not None:
            return node.op, weight.shape, _decoded(weight)
        return node.op, node.target, plain(node.args), plain(node.kwargs)

    return tuple(told(node) for node in program.graph.nodes if node.op != "output")


def _derived(program: Program, inputs: Inputs) -> Metas:
    """The meta entries of each node but the output."""
    metas: Metas = []
    sizes = _Sizes({d for shape, _ in inputs.values() for d in shape if isinstance(d, str)})
    values: dict[fx.Node, Any] = {}
    # the Python dispatcher has forms of composite ops (such as matmul) that keep sizes symbolic where C++ does not
    with sizes.mode, torch.no_grad(), enable_python_dispatcher(), _quiet():
        for node in program.graph.nodes:
            if node.op == "output":
                break
            try:
                values[node] = _value(program, node, values, inputs, sizes)
                sizes.check()
                metas.append(sizes.meta(values[node]))
            except SmeltError as fault:
                raise SmeltError(f"{program.name}: %{node.name}: {fault}") from fault
            except Exception as fault:  # fake kernels raise every kind; each means arguments that do not fit
                raise SmeltError(
                    f"{program.name}: {_call(node, values, sizes)} does not fit: {sizes.named(fault)}"
                ) from fault
    return metas


def _described(program: Program, name: str) -> tuple[tuple[int | str, ...], torch.dtype]:
    """Shape (strings are symbols) and dtype of an input, from the facts or by its customary name."""
    inputs = program.facts.get("inputs")
    described = inputs.get(name) if isinstance(inputs, dict) else None
    if described is None and name in ("tokens", "positions", "mask"):
        return ("B", "T"), torch.int64
    if described is None:
        raise SmeltError(f'{program.name}: input "{name}" has no shape; describe it in facts["inputs"]')
    shape, dtype = (described.get(key) if isinstance(described, dict) else None for key in ("shape", "dtype"))
    if not isinstance(shape, list | tuple) or not all(map(_is_size, shape)) or dtype not in DTYPES:
        raise SmeltError(
            f'{program.name}: facts["inputs"]["{name}"] is not like {{"shape": ["B", 3], "dtype": "float32"}}'
        )
    return tuple(shape), getattr(torch, dtype)


def _is_size(size: Any) -> bool:
    return size.isidentifier() if isinstance(size, str) else isinstance(size, int) and size >= 0


def _value(program: Program, node: fx.Node, values: dict[fx.Node, Any], inputs: Inputs, sizes: _Sizes) -> Any:
    if node.op == "placeholder":
        shape, dtype = inputs[str(node.target)]
        return torch.empty(tuple(sizes.of[d] if isinstance(d, str) else d for d in shape), dtype=dtype)
    if node.op == "get_attr":
        if node.target not in program.weights:
            raise SmeltError(f"reads the weight '{node.target}', which the program does not have")
        weight = program.weights[str(node.target)]
        return torch.empty(weight.shape, dtype=_decoded(weight))
    if node.op != "call_function":
        raise SmeltError(f"a node of kind {node.op} has no place in a program")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]  # call_function: the target is callable


def _decoded(weight: Weight) -> torch.dtype:
    stored = getattr(weight.encoding, "torch_dtype", torch.float32)
    return torch.float32 if stored.is_floating_point else stored


class _Sizes:
    """The symbols of a program as torch's symbolic integers, and the way back."""

    def __init__(self, names: set[str]) -> None:
        others = sorted(names - _EXAMPLES.keys())
        if len(others) > len(_MORE_EXAMPLES):
            raise SmeltError(
                f"inputs use {len(others)} symbols beyond B and T, at most {len(_MORE_EXAMPLES)} can be told apart"
            )
        examples = {n: _EXAMPLES[n] for n in _EXAMPLES if n in names} | dict(zip(others, _MORE_EXAMPLES, strict=False))
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(examples))
        real = torch.empty(tuple(examples.values()), device="meta")
        traced = self.mode.from_tensor(real, symbolic_context=context)
        self.of: dict[str, Any] = dict(zip(examples, traced.shape, strict=True))
        self._symbols = {size.node.expr: symbol(name) for name, size in self.of.items()}

    def check(self) -> None:
        """Raises SmeltError if some call so far holds for one size only."""
        for name, size in self.of.items():
            if size.node.expr not in self._symbols or self._symbols[size.node.expr] != symbol(name):
                raise SmeltError(f"holds only for {name} = {self._symbols.get(size.node.expr, size.node.expr)}")

    def meta(self, value: Any) -> dict[str, Any]:
        """The meta entries of a value."""
        if isinstance(value, list | tuple):
            members = [self.meta(member) for member in value]
            return {key: tuple(member[key] for member in members) for key in ("shape", "dtype")}
        if isinstance(value, torch.Tensor):
            return {"shape": tuple(self._dim(d) for d in value.shape), "dtype": value.dtype}
        if isinstance(value, bool | torch.SymBool):
            return {"shape": (), "dtype": torch.bool}
        if isinstance(value, int | torch.SymInt):
            return {"shape": (), "dtype": torch.int64, "value": self._dim(value)}
        if isinstance(value, float | torch.SymFloat):
            return {"shape": (), "dtype": torch.float64}
        raise SmeltError(f"yields a {type(value).__name__}; a node yields tensors or sizes")

    def named(self, fault: BaseException) -> str:
        """The first line of torch's message, with our symbols for its own."""
        line = next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)[:200]
        names = {str(theirs): str(ours) for theirs, ours in self._symbols.items()}
        return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), line)

    def _dim(self, size: Any) -> Any:
        expr = _plain(size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size), self._symbols)
        return int(expr) if expr.is_Integer else expr


def _plain(expr: Any, symbols: dict[Any, sympy.Symbol]) -> Any:
    """torch's size expression in sympy's own functions and our symbols."""
    if expr in symbols:
        return symbols[expr]
    if expr.is_Symbol:
        raise SmeltError("yields a shape that depends on the data; sizes must follow from the inputs' sizes")
    args = [_plain(arg, symbols) for arg in expr.args]
    match type(expr).__name__:
        case "FloorDiv" | "CleanDiv":
            return sympy.floor(args[0] / args[1])
        case "CeilDiv":
            return sympy.ceiling(args[0] / args[1])
        case "ModularIndexing":
            return sympy.Mod(sympy.floor(args[0] / args[1]), args[2])
        case "Mod" | "PythonMod":
            return sympy.Mod(*args)
        case "Max" | "Min" as name:
            return getattr(sympy, name)(*args)
        case "IntTrueDiv" | "FloatTrueDiv":
            return args[0] / args[1]
        case "PowByNatural":
            return args[0] ** args[1]
        case "FloorToInt" | "TruncToInt":
            return sympy.floor(args[0])
        case "CeilToInt":
            return sympy.ceiling(args[0])
        case "ToFloat" | "Identity":
            return args[0]
        case "Add" | "Mul" | "Pow" | "floor" | "ceiling":
            return expr.func(*args)
        case name if not args:
            return expr
        case name:
            raise SmeltError(f"yields a size with {name}, which has no symbolic form yet")


def _call(node: fx.Node, values: dict[fx.Node, Any], sizes: _Sizes) -> str:
    """The failing call with the shapes of its operands."""
    shapes = [
        f"%{n.name} {list(map(str, sizes.meta(values[n])['shape']))}".replace("'", "")
        for n in node.all_input_nodes
        if isinstance(values.get(n), torch.Tensor)
    ]
    return f"%{node.name} = {node.target}({', '.join(shapes)})"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback for each fake kernel that raises; the error says it already."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
