"""What a step costs: operations and bytes of every node, in B rows, T new tokens and S tokens before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sympy
from torch import fx

from .aten_cost import count, is_view, product_flops, reads_rows
from .cache.plan import Site
from .errors import SmeltError
from .ops import ATTENTION, CACHED_ATTENTION, EXPERTS, HEAD, LINEAR, OPS, arguments
from .program import Program
from .shapes import derive, symbol
from .targets import target_name
from .weight import Weight

B, S = symbol("B"), symbol("S")
_PRODUCTS = {op.target for op in (LINEAR, HEAD, ATTENTION, CACHED_ATTENTION, EXPERTS)}
_ZERO = sympy.Integer(0)


class Work(NamedTuple):
    """Work in numbers."""

    flops: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class NodeCost:
    """Work of one node; `op` as printed. `product`: whether its flops are those of a matrix product."""

    name: str
    op: str
    flops: sympy.Expr
    weight_bytes: sympy.Expr
    cache_bytes: sympy.Expr
    activation_bytes: sympy.Expr
    product: bool


@dataclass(frozen=True)
class Row:
    """One line of a table: a node, or all nodes of one op."""

    name: str
    nodes: int
    work: Work


@dataclass(frozen=True)
class Costs:
    """Work of one step of a Program.

    flops: a multiplication and an addition are two; an attention counts every stored token, whatever its window.
    weight_bytes: encoded bytes read, of tables only the rows looked up, of experts at most the chosen ones.
    cache_bytes: what the cache holds of S tokens, all of it read once. activation_bytes: operands read and results
    written by each node alone, in the types of the interpreter; views are free. Fusion saves part of these.
    """

    nodes: tuple[NodeCost, ...]

    @property
    def flops(self) -> sympy.Expr:
        """Operations in B, T, S."""
        return _total(self.nodes, "flops")

    @property
    def product_flops(self) -> sympy.Expr:
        """Operations of matrix products alone."""
        return _total([node for node in self.nodes if node.product], "flops")

    @property
    def weight_bytes(self) -> sympy.Expr:
        """Encoded bytes of weights read."""
        return _total(self.nodes, "weight_bytes")

    @property
    def cache_bytes(self) -> sympy.Expr:
        """Bytes of the cache read, in B and S."""
        return _total(self.nodes, "cache_bytes")

    @property
    def activation_bytes(self) -> sympy.Expr:
        """Bytes that nodes exchange."""
        return _total(self.nodes, "activation_bytes")

    def evaluate(self, B: int = 1, T: int = 1, S: int = 128, **others: int) -> Work:
        """The whole step in numbers; `others` gives further symbols of the inputs."""
        return _work(self.nodes, {"B": B, "T": T, "S": S, **others})

    def table(self, by: Literal["op", "node"] = "op", B: int = 1, T: int = 1, S: int = 128, **others: int) -> list[Row]:
        """Rows in graph order, without those that cost nothing."""
        groups: dict[str, list[NodeCost]] = {}
        for node in self.nodes:
            groups.setdefault(node.op if by == "op" else node.name, []).append(node)
        sizes = {"B": B, "T": T, "S": S, **others}
        rows = [Row(name, len(members), _work(members, sizes)) for name, members in groups.items()]
        return [row for row in rows if any(row.work)]


def cost(program: Program) -> Costs:
    """The cost of one step; derives shapes first where they are missing."""
    if any("shape" not in node.meta for node in program.graph.nodes if node.op != "output"):
        derive(program)
    return Costs(tuple(_node(program, node) for node in program.graph.nodes if node.op == "call_function"))


def _total(nodes: Sequence[NodeCost], what: str) -> sympy.Expr:
    return sympy.Add(*(getattr(node, what) for node in nodes))


def _work(nodes: Sequence[NodeCost], sizes: dict[str, int]) -> Work:
    values = {symbol(name): size for name, size in sizes.items()}
    numbers = [sympy.sympify(_total(nodes, what)).subs(values) for what in Work._fields]
    if unknown := set().union(*(number.free_symbols for number in numbers)):
        raise SmeltError(f"the cost depends on {', '.join(sorted(map(str, unknown)))}: give a number for each")
    return Work(*(int(sympy.ceiling(number)) for number in numbers))


def _node(program: Program, node: fx.Node) -> NodeCost:
    name, product = target_name(node.target), node.target in _PRODUCTS
    if is_view(node):
        return NodeCost(node.name, name, _ZERO, _ZERO, _ZERO, _ZERO, False)
    cached = _ZERO
    if node.target in OPS:
        flops = _dialect_flops(node)
        if node.target is CACHED_ATTENTION.target and program.cache is not None:
            site = program.cache[arguments(node)["layer"]]
            flops = flops.subs(S, _stored(site))
            cached = B * site.bits(S) / 8
    else:
        found = product_flops(node)
        flops, product = (sympy.Add(*(count(s) for s, _ in _results(node))), False) if found is None else (found, True)
    read, moved = _ZERO, _bytes(node)
    for operand in node.all_input_nodes:
        chain = list(_views(operand))
        if chain[-1].op == "get_attr":
            read += _weight_bytes(program.weights[str(chain[-1].target)], node, chain)
        elif "value" not in operand.meta:
            moved += _bytes(operand)
    return NodeCost(node.name, name, flops, read, cached, moved, product)


def _dialect_flops(node: fx.Node) -> sympy.Expr:
    given = {n: v.meta["shape"] if isinstance(v, fx.Node) else v for n, v in arguments(node).items()}
    return sympy.sympify(OPS[node.target].cost(**given).flops)


def _stored(site: Site) -> sympy.Expr:
    """Tokens that a site still holds of S, as in `Site.counts`."""
    if site.tail is None:
        return S
    flushed = sympy.floor(sympy.Max(0, S - site.sink - site.tail) / site.page)
    budget = site.select.budget if site.select else None
    held = flushed if budget is None or not site.kept else sympy.Min(flushed, budget // site.kept)
    return S - flushed * site.page + held * site.kept


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what it is a view of, back to where the values lie."""
    yield node
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node


def _weight_bytes(weight: Weight, reader: fx.Node, chain: Sequence[fx.Node]) -> sympy.Expr:
    """Encoded bytes that `reader` takes of a weight that it sees through `chain`."""
    values = sympy.Min(*(count(view.meta["shape"]) for view in chain))
    if reads_rows(reader, chain[0]):
        values = count(reader.meta["shape"])
    elif reader.target is EXPERTS.target:
        a = arguments(reader)
        experts = weight.shape[0]
        if chain[0] in (a["gate_up"], a["down"]):
            values *= sympy.Min(experts, count(a["chosen"].meta["shape"])) / sympy.Integer(experts)
    return values * sympy.Rational(weight.bits, 8 * max(1, count(weight.shape)))


def _bytes(node: fx.Node) -> sympy.Expr:
    return sympy.Add(*(count(shape) * dtype.itemsize for shape, dtype in _results(node)))


def _results(node: fx.Node) -> list[tuple[Any, Any]]:
    """Shape and dtype of each result."""
    shape, dtype = node.meta["shape"], node.meta["dtype"]
    return list(zip(shape, dtype, strict=True)) if isinstance(dtype, tuple) else [(shape, dtype)]
