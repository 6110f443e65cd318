"""Fusion: which nodes of a graph become one kernel, and why a neighbour was not taken.

A region grows from a matrix product along its only reader, as long as that is pointwise over the same shape: bias,
activation, gate and residual then never reach memory. Products that read one input and store it alike run as one. What
is left of pointwise nodes forms chains of its own. Every region is convex, which is checked on the graph: a path that
left it and came back would need its result before it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx
import sympy
from torch import fx

from ..ir.ops import HEAD, LINEAR, QUANTIZED, RMS_NORM, arguments, is_op
from ..ir.weight import Weight
from .pointwise import is_pointwise

FLOAT = 4  # bytes of a value that a fused kernel neither writes nor reads again


@dataclass(frozen=True)
class Chain:
    """One output of a region: its products (two where a gate multiplies), and the pointwise nodes behind them."""

    products: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]

    @property
    def output(self) -> fx.Node:
        """The node whose value the chain leaves."""
        return self.tail[-1] if self.tail else self.products[-1]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them."""
        return (*self.products, *self.tail)


@dataclass(frozen=True)
class Region:
    """Nodes that one kernel computes. It runs where node `at` stands: all that it reads is there by then."""

    kind: Literal["product", "pointwise", "quantize", "attention"]
    chains: tuple[Chain, ...]
    at: fx.Node
    width: int | None = None  # columns of a group of 8-bit activations that a product reads
    notes: tuple[str, ...] = ()
    saved: Any = 0  # bytes a step that no longer go through memory

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All members."""
        return tuple(node for chain in self.chains for node in chain.nodes)

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The members whose values others read."""
        return tuple(chain.output for chain in self.chains)

    def __str__(self) -> str:
        """A line of the dump."""
        chains = ", ".join(" → ".join((" · ".join(p.name for p in c.products), *(t.name for t in c.tail)))
                           if c.products else " → ".join(t.name for t in c.tail) for c in self.chains)  # fmt: skip
        saved = f"; saves {self.saved} bytes" if self.saved != 0 else ""
        return f"{self.kind}: {chains}{saved}{''.join(f'; {note}' for note in self.notes)}"


@dataclass
class _Search:
    """The state of one fusion: the graph, and what is taken."""

    graph: fx.Graph
    weights: Mapping[str, Weight]
    covers: Callable[[fx.Node, int | None], str | None]
    taken: set[fx.Node] = field(default_factory=set)
    widths: dict[fx.Node, int] = field(default_factory=dict)

    def chain(self, product: fx.Node) -> tuple[Chain, str]:
        """The longest chain from a product, and why it ends."""
        products, tail, out = [product], list[fx.Node](), product
        while True:
            reader, why = _only_reader(out)
            if reader is None:
                return Chain(tuple(products), tuple(tail)), why
            if reader in self.taken:
                return Chain(tuple(products), tuple(tail)), f"{reader.name} not taken: it is in another kernel"
            second = None
            for other in reader.all_input_nodes:
                if other in (*products, *tail):
                    continue
                if len(products) == 1 and other is not out and self._twin(product, other, reader):
                    second = other
                elif reason := self._operand(other, reader, product):
                    return Chain(tuple(products), tuple(tail)), f"{reader.name} not taken: {reason}"
            products += [second] if second is not None else []
            tail.append(reader)
            out = reader

    def _twin(self, product: fx.Node, other: fx.Node, reader: fx.Node) -> bool:
        """Whether another product can share the kernel: same input and storage, and only this reader."""
        if not is_op(other, LINEAR) or other in self.taken or list(other.users) != [reader]:
            return False
        mine, its = arguments(product), arguments(other)
        if its["x"] is not mine["x"] or self.covers(other, self.widths.get(other)) is not None:
            return False
        return self._weight(product).encoding == self._weight(other).encoding

    def _operand(self, other: fx.Node, reader: fx.Node, product: fx.Node) -> str | None:
        """Why a tensor cannot be read beside the result, or None: it has its shape, or one value a column."""
        if other.op == "get_attr":
            shape: Any = self.weights[str(other.target)].shape
            return None if len(shape) == 1 and shape == _shape(reader)[-1:] else f"{other.target} is {list(shape)}"
        return None if _shape(other) == _shape(reader) else f"{other.name} has another shape"

    def _weight(self, product: fx.Node) -> Weight:
        return self.weights[str(arguments(product)["weight"].target)]


def fuse(
    graph: fx.Graph, weights: Mapping[str, Weight], covers: Callable[[fx.Node, int | None], str | None]
) -> list[Region]:
    """The regions of a graph in its order. `covers(product, width)` says why a product has no kernel, or None.

    Nodes in no region have kernels of their own.
    """
    search = _Search(graph, weights, covers)
    regions = [*_quantizers(search)]
    regions += _products(search)
    regions += _pointwise(search)
    order = {node: i for i, node in enumerate(graph.nodes)}
    _check_convex(graph, regions)
    return sorted(regions, key=lambda region: order[region.at])


def _quantizers(search: _Search) -> Iterator[Region]:
    """Activations that only integer products read leave as codes; a norm before them joins."""
    for node in search.graph.nodes:
        if not is_op(node, QUANTIZED):
            continue
        args = arguments(node)
        width, readers = int(args["group"]), list(node.users)
        stored = [r for r in readers if is_op(r, LINEAR, HEAD) and arguments(r)["x"] is node]
        refused = next((r for r in readers if r not in stored or search.covers(r, width) is not None), None)
        if args["bits"] != 8 or refused is not None or not readers:
            continue
        search.widths.update(dict.fromkeys(readers, width))
        norm = args["x"]
        if is_op(norm, RMS_NORM) and list(norm.users) == [node]:
            chain = Chain((), (norm, node))
            yield Region("quantize", (chain,), node, width, (), _bytes(norm) * 2)
        else:
            chain = Chain((), (node,))
            notes = (f"{norm.name} not taken: {'also read by others' if len(norm.users) > 1 else 'no norm'}",)
            yield Region("quantize", (chain,), node, width, notes)
        search.taken.update(chain.nodes)


def _products(search: _Search) -> Iterator[Region]:
    order = {node: i for i, node in enumerate(search.graph.nodes)}
    alike: dict[Any, list[tuple[Chain, str]]] = {}
    for node in search.graph.nodes:
        width = search.widths.get(node)
        if node in search.taken or not is_op(node, LINEAR, HEAD) or search.covers(node, width) is not None:
            continue
        chain, why = search.chain(node)
        search.taken.update(chain.nodes)
        args = arguments(node)
        alone = bool(chain.tail) or is_op(node, HEAD)  # its operands may not be there when the first of others is
        key = node if alone else (args["x"], search._weight(node).encoding, args.get("bias") is None)
        alike.setdefault(key, []).append((chain, why))
    for found in alike.values():
        chains = tuple(chain for chain, _ in found)
        first = min((chain.output for chain in chains), key=order.__getitem__)
        saved = sum((2 * _bytes(node) for chain in chains for node in chain.nodes[:-1]), sympy.Integer(0))
        notes = tuple(dict.fromkeys(why for _, why in found if why))
        yield Region("product", chains, first, search.widths.get(chains[0].products[0]), notes, saved)


def _pointwise(search: _Search) -> Iterator[Region]:
    for node in search.graph.nodes:
        if node in search.taken or not _alone(node, search):
            continue
        tail, out, why = [node], node, ""
        while True:
            reader, why = _only_reader(out)
            if reader is None or reader in search.taken:
                break
            reasons = [search._operand(o, reader, node) for o in reader.all_input_nodes if o not in tail]
            if any(reasons):
                why = f"{reader.name} not taken: {next(filter(None, reasons))}"
                break
            tail.append(reader)
            out = reader
        search.taken.update(tail)
        saved = sum((2 * _bytes(each) for each in tail[:-1]), sympy.Integer(0))
        yield Region("pointwise", (Chain((), tuple(tail)),), out, None, (why,) if why else (), saved)


def _alone(node: fx.Node, search: _Search) -> bool:
    return is_pointwise(node) and bool(_shape(node)) and not any(
        search._operand(other, node, node) for other in node.all_input_nodes
    )  # fmt: skip


def _only_reader(node: fx.Node) -> tuple[fx.Node | None, str]:
    """The one pointwise node that reads a value of its own shape, or why there is none."""
    readers = list(node.users)
    if len(readers) != 1:
        return None, f"{node.name} is read by {len(readers)} nodes"
    (reader,) = readers
    if reader.op == "output":
        return None, ""
    if not is_pointwise(reader):
        return None, f"{reader.name} not taken: it is not pointwise"
    if _shape(reader) != _shape(node) or not _shape(node):
        return None, f"{reader.name} not taken: it has another shape"
    return reader, ""


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The derived shape; () where none was."""
    return tuple(node.meta.get("shape", ()))


def _bytes(node: fx.Node) -> sympy.Expr:
    return FLOAT * sympy.prod([sympy.sympify(d) for d in _shape(node)]) if _shape(node) else sympy.Integer(0)


def _check_convex(graph: fx.Graph, regions: list[Region]) -> None:
    whole: nx.DiGraph = nx.DiGraph((used, node) for node in graph.nodes for used in node.all_input_nodes)
    kept = {node: i for i, region in enumerate(regions) for node in region.nodes}
    fused = nx.DiGraph((kept.get(a, a), kept.get(b, b)) for a, b in whole.edges if kept.get(a, a) != kept.get(b, b))
    if not nx.is_directed_acyclic_graph(fused):
        cycle = nx.find_cycle(fused)
        raise AssertionError(f"a fused region reads what depends on it: {cycle}")
