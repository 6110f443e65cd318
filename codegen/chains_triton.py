"""Products of one input with what is fused before and behind them, by the Triton products; a launch or a few.

What a product takes in itself is a norm, a bias, an activation, a gate and a residual; the rest of a chain follows as a
pointwise kernel. Products that are stored alike and end where they end (query, key and value) are one product with
their rows below each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import sympy
import torch
from torch import fx

from ..ir.encoding import Encoding
from ..ir.encoding.expr import loads, n, stored
from ..ir.errors import SmeltError
from ..ir.ops import ACTIVATIONS, GATED, arguments, is_op
from ..ir.weight import Weight
from . import pointwise_triton as pointwise
from .autotune_triton import form
from .device_triton import below, interpreted, on_host
from .fuse import Chain
from .gemm_triton import TritonProduct, source
from .gemv import name as encoding_name
from .gemv_triton import source as gemv_source
from .plan import Run
from .pointwise import label, outside
from .product_triton import POINTERS, K, Product
from .regions_triton import Fused, Room, rows
from .rows_triton import rms_norm

aten = torch.ops.aten
_ACTS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}


def covers(encoding: Encoding, shape: tuple[int, ...]) -> str | None:
    """Why there is no kernel for a product with a weight of that encoding and shape, or None."""
    if len(shape) != 2:
        return f"needs a weight [N, K], not {list(shape)}"
    if reason := encoding.refuses(shape):
        return reason
    span = _span(encoding)
    if isinstance(span, str):
        return span
    return f"rows of {shape[1]} are no multiple of {span}" if shape[1] % span else None


@cache
def _span(encoding: Encoding) -> int | str:
    """What the columns of a weight must be a multiple of, or why no kernel reads it."""
    try:
        product = Product(encoding)
    except (NotImplementedError, SmeltError) as error:
        return str(error)
    if strange := [dtype for dtype in product.parts.values() if dtype not in POINTERS]:
        return f"it stores {strange[0]}, which no kernel loads"
    return product.columns.span or 1


@dataclass(frozen=True)
class Step:
    """One launch: `product` of weights by name, and what it reads beside x; None where there is none."""

    product: Product
    weights: tuple[str, ...]  # below each other
    up: str | None
    biases: tuple[fx.Node, ...]
    residual: fx.Node | None
    outputs: tuple[fx.Node, ...]  # whose values lie side by side
    kept: bool = True  # others may read an output, or what follows is written over it


@dataclass(frozen=True)
class Plain:
    """What follows a chain's launches: pointwise `nodes`, the value of the last one written over that of `into`."""

    nodes: tuple[fx.Node, ...]
    into: fx.Node


@dataclass(frozen=True, eq=False)
class ProductsKernel:
    """The kernel of a product region. `made` holds the compiled products, shared between all regions of a plan."""

    region: Fused
    weights: Mapping[str, Weight]
    made: dict[Product, TritonProduct]
    stacked: dict[tuple[str, ...], Weight] = field(default_factory=dict)

    @property
    def name(self) -> str:
        chain = self.region.chains[0]
        words = ["triton", encoding_name(self._weight(chain.products[0]).encoding)]
        words += ["rms_norm"] if self.region.before else []
        return ".".join([*words, *map(label, chain.tail)])

    @property
    def source(self) -> str:
        step = next(step for step in self.steps if isinstance(step, Step))
        product = replace(step.product, norm=bool(self.region.before))
        rest = [pointwise.source(s.nodes, outside(s.nodes)) for s in self.steps if isinstance(s, Plain)]
        return "\n\n".join([_sources(product), *rest])

    @cached_property
    def steps(self) -> tuple[Step | Plain, ...]:
        """The launches in order."""
        chains = self.region.chains
        if len(chains) > 1 and all(not chain.tail and len(chain.products) == 1 for chain in chains):
            nodes = [chain.products[0] for chain in chains]
            biases = tuple(bias for node in nodes if (bias := arguments(node).get("bias")) is not None)
            encoding = self._weight(nodes[0]).encoding
            whole = len(biases) in (0, len(nodes)) and all(bias.op == "get_attr" for bias in biases)
            if whole and all(_stacks(self._weight(node)) for node in nodes):
                return (Step(Product(encoding), tuple(map(_name, nodes)), None, biases, None, tuple(nodes)),)
        return tuple(step for chain in chains for step in self._steps_of(chain))

    def _steps_of(self, chain: Chain) -> list[Step | Plain]:
        first, tail = chain.products[0], chain.tail
        product, up, act, taken = Product(self._weight(first).encoding), None, None, 0
        if len(chain.products) == 2:
            gate = _gate(chain)
            if gate is None:
                left, right = (self._alone(node, None, None, node) for node in chain.products)
                return [left, replace(right, kept=False), Plain(tail, first)]
            first, up, act, taken = *gate, arguments(tail[0])["act"], 1
            product = Product(self._weight(first).encoding, self._weight(up).encoding)
        elif tail and tail[0].target in _ACTS:
            act, taken = _ACTS[tail[0].target], 1
            if tail[0].kwargs.get("approximate") == "tanh":
                act = "gelu_tanh"
        out = tail[taken - 1] if taken else first
        residual = _residual(chain, out, tail[taken]) if taken < len(tail) else None
        if residual is not None:
            out, taken = tail[taken], taken + 1
        launch = replace(self._alone(first, up, residual, out), product=replace(product, act=act))
        return [launch, *([Plain(tail[taken:], out)] if taken < len(tail) else [])]

    def _alone(self, node: fx.Node, up: fx.Node | None, residual: fx.Node | None, out: fx.Node) -> Step:
        bias = arguments(node).get("bias")
        product = Product(self._weight(node).encoding)
        second = None if up is None else _name(up)
        return Step(product, (_name(node),), second, () if bias is None else (bias,), residual, (out,))

    def bind(self, room: Room) -> tuple[dict[fx.Node, torch.Tensor], list[Run]]:
        """The chains' outputs, and the calls that write them."""
        x = arguments(self.region.chains[0].products[0])["x"]
        given = room.value(arguments(x)["x"] if self.region.before else x)
        lead, flat, runs = given.shape[:-1], rows(room, given), list[Run]()
        norm = self._norm(room)
        if norm and form(len(flat)) != "gemv":
            # programs over many rows would each compute the sizes of all of them
            whole = room.spare(*flat.shape)
            runs.append(partial(rms_norm, flat, whole, norm["gain"], norm["eps"], norm["offset"]))
            flat, norm = whole, {}
        known: dict[fx.Node, torch.Tensor] = {}
        for step in self.steps:
            if isinstance(step, Plain):
                operands, into = outside(step.nodes), known[step.into]
                runs.append(pointwise.bind(pointwise.source(step.nodes, operands), operands, room, into, known))
                known[step.nodes[-1]] = into
                continue
            joined, run = self._bound(step, room, flat, lead, norm)
            runs.append(run)
            known |= joined
        return {node: known[node] for node in self.region.outputs}, runs

    def _bound(
        self, step: Step, room: Room, x: torch.Tensor, lead: torch.Size, norm: Mapping[str, Any]
    ) -> tuple[dict[fx.Node, torch.Tensor], Run]:
        weight = self._stack(step.weights)
        product = replace(step.product, norm=bool(norm))
        out = (room.take if step.kept else room.spare)(*lead, weight.shape[0])
        parts = _parts(weight.encoding)
        biases = [room.value(bias) for bias in step.biases]
        residual = None
        if step.residual is not None:
            residual = room.value(step.residual)
            residual = (residual if residual.is_contiguous() else room.copy(residual)).view(-1, weight.shape[0])
        up = None if step.up is None else self.weights[step.up].parts
        run = partial(
            self._product(product),
            {name: weight.parts[name] for name in parts},
            x,
            out.view(-1, weight.shape[0]),
            up=up and {name: up[name] for name in parts},
            bias=torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None,
            residual=residual,
            **norm,
        )
        sizes = [self.weights[name].shape[0] for name in step.weights]
        return dict(zip(step.outputs, out.split(sizes, -1), strict=True)), run

    def _norm(self, room: Room) -> dict[str, Any]:
        if not self.region.before:
            return {}
        args = arguments(self.region.before[0])
        return {"gain": room.value(args["weight"]), "eps": float(args["eps"]), "offset": float(args["offset"])}

    def _product(self, product: Product) -> TritonProduct:
        if product not in self.made:
            self.made[product] = TritonProduct(product, tune=not interpreted())
        return self.made[product]

    def _stack(self, names: tuple[str, ...]) -> Weight:
        """The weights below each other; on the device they lie only so."""
        first = self.weights[names[0]]
        if len(names) == 1:
            return first
        if names not in self.stacked:
            each = [self.weights[name] for name in names]
            shape = (sum(weight.shape[0] for weight in each), first.shape[1])
            self.stacked[names] = Weight(shape, first.encoding, below([weight.parts for weight in each]))
        return self.stacked[names]

    def _weight(self, node: fx.Node) -> Weight:
        return self.weights[_name(node)]


def _name(product: fx.Node) -> str:
    return str(arguments(product)["weight"].target)


def _gate(chain: Chain) -> tuple[fx.Node, fx.Node] | None:
    """The product that is activated and the one that it is multiplied by, or None where a kernel has no such form."""
    node = chain.tail[0]
    if not is_op(node, GATED):
        return None
    args = arguments(node)
    gate, up = args["gate"], args["up"]
    if {gate, up} != set(chain.products) or args["act"] not in ACTIVATIONS or arguments(up).get("bias") is not None:
        return None
    return gate, up


def _residual(chain: Chain, out: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a node adds to `out`, where it is a tensor of its shape from elsewhere."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or out not in node.args:
        return None
    others = [each for each in node.args if each is not out]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    return None if others[0].op == "get_attr" or others[0] in chain.nodes else others[0]


def _stacks(weight: Weight) -> bool:
    """Whether the parts of a weight hold its rows one after the other, so that more rows can follow."""
    parts = on_host(weight.parts)
    return _by_rows(weight.encoding) and all(
        parts[name].shape[0] == weight.shape[0] for name in _parts(weight.encoding)
    )


@cache
def _by_rows(encoding: Encoding) -> bool:
    """Whether every index into the parts grows by the same for every row."""
    expr = encoding.expr((None, K))
    if {load.part for load in loads(expr)} != set(stored(expr)):
        return False  # a table serves all rows of its own weight
    grown = (sympy.expand(load.index - load.index.subs(n, 0)) for load in loads(expr))
    return not any(n in (index / n).simplify().free_symbols for index in grown)


@cache
def _parts(encoding: Encoding) -> tuple[str, ...]:
    """The parts that a kernel reads."""
    return tuple(stored(encoding.expr((None, K))))


@cache
def _sources(product: Product) -> str:
    """Of the kernels for one row of x and for many."""
    return f"{gemv_source(product)}\n\n{source(product)}"
