"""Edges along which a channel can be scaled: what makes it takes 1 / s, the columns that read it take s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ...ir.ops import GATED, HEAD, LAYER_NORM, LINEAR, RMS_NORM, arguments, is_op
from ...ir.program import Program
from ._follow import behind, follow, matrix, products, rows_at, store, unfit, wide
from ._heads import Values, values

Kind = Literal["norm", "values", "down"]
aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """A weight whose `rows` [C] make the channels 0, 1, …; of a vector the entries.

    offset: what is added to the weight before it is used, in Gemma's norms.
    """

    name: str
    rows: torch.Tensor
    offset: float = 0.0


@dataclass(frozen=True)
class Edge:
    """Channels 0 to `count` - 1 between `makers` and the products `readers` of the value x [..., K].

    columns: int64 [K], the channel of each column.
    """

    name: str
    x: fx.Node
    columns: torch.Tensor
    readers: tuple[fx.Node, ...]
    makers: tuple[Made, ...]

    @property
    def count(self) -> int:
        """How many channels there are."""
        return int(self.columns.max()) + 1

    def scale(self, program: Program, by: torch.Tensor) -> None:
        """Let the makers give 1 / by [C] of each channel, and the readers take `by` of it."""
        for name in dict.fromkeys(matrix(reader) for reader in self.readers):
            store(program, name, wide(program, name) * by[self.columns])
        for made in self.makers:
            value = wide(program, made.name) + made.offset
            shares = torch.ones(len(value), dtype=torch.float64)
            shares[made.rows] = 1 / by
            store(program, made.name, value * shares.view(-1, *[1] * (value.dim() - 1)) - made.offset)

    def centre(self, program: Program, middle: torch.Tensor) -> str | None:
        """Take `middle` [C] from the channels and give it to the readers' biases; why that cannot be, or None."""
        norm = arguments(self.x) if is_op(self.x, LAYER_NORM) else {}
        if norm.get("bias") is None:
            return f"{self.x.name} adds no bias"
        held = {reader: arguments(reader).get("bias") for reader in self.readers}
        stored = {reader: str(b.target) for reader, b in held.items() if b is not None and b.op == "get_attr"}
        if len(stored) < len(held):
            return f"{next(reader for reader in held if reader not in stored).name} adds no stored bias"
        if why := unfit(program, {name: [reader] for reader, name in stored.items()}):
            return why
        for reader, name in stored.items():
            store(program, name, wide(program, name) + wide(program, matrix(reader)) @ middle[self.columns])
        name = str(norm["bias"].target)
        store(program, name, wide(program, name) - middle)
        return None


def edges(program: Program, kinds: Sequence[Kind]) -> tuple[list[Edge], dict[str, str]]:
    """The edges in the order in which their readers run, and by name why others cannot be scaled.

    Needs derived shapes.
    """
    tried: dict[str, Edge | str] = {}
    if "norm" in kinds:
        tried |= {node.name: _norm(program, node) for node in program.calls(RMS_NORM, LAYER_NORM)}
    if "values" in kinds:
        for name, found in values(program).items():
            tried[name] = found if isinstance(found, str) else _values(found)
    if "down" in kinds:
        tried |= {node.name: _down(program, node) for node in program.calls(GATED, aten.relu.default)}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found_ = sorted((edge for edge in tried.values() if isinstance(edge, Edge)), key=lambda edge: order[edge.x])
    return found_, {name: edge for name, edge in tried.items() if isinstance(edge, str)}


def _norm(program: Program, node: fx.Node) -> Edge | str:
    a = arguments(node)
    stored = [a[part] for part in ("weight", "bias") if a.get(part) is not None]
    if any(part.op != "get_attr" for part in stored):
        return "its gain is computed, not stored"
    readers = products(node)
    if isinstance(readers, str):
        return readers
    if any(is_op(reader, HEAD) for reader in readers):
        return "read by the vocabulary head, which is not scaled"
    changed = {matrix(reader): readers for reader in readers} | {str(part.target): [node] for part in stored}
    if why := unfit(program, changed):
        return why
    channels = torch.arange(program.weights[str(a["weight"].target)].shape[0])
    offsets = (a.get("offset", 0.0), 0.0)
    makers = [Made(str(part.target), channels, at) for part, at in zip(stored, offsets, strict=False)]
    return Edge(str(a["weight"].target), node, channels, tuple(readers), tuple(makers))


def _values(found: Values) -> Edge | str:
    heads, width = found.rows.shape
    if len(found.rows.unique()) < heads * width:
        return "its heads are one head repeated"
    group = torch.arange(len(found.columns)) * heads // len(found.columns)
    columns = torch.empty(found.columns.numel(), dtype=torch.int64)
    columns[found.columns] = group[:, None] * width + torch.arange(width)
    makers = _rows(found.producer, found.rows.flatten())
    return Edge(found.name, arguments(found.consumer)["x"], columns, (found.consumer,), makers)


def _down(program: Program, node: fx.Node) -> Edge | str:
    """Behind a gate's other factor, or behind a rectifier: both pass a positive factor on."""
    up = arguments(node)["up" if is_op(node, GATED) else "self"]
    producer, reads = behind(up), follow(node)
    if not is_op(producer, LINEAR) or len(reads) != 1 or not (reads[0].multiplies and is_op(reads[0].node, LINEAR)):
        return "does not stand between two matrix products alone"
    at, columns, consumer = rows_at(producer, node, up), reads[0].columns, reads[0].node
    if at is None or columns is None:
        return f"other nodes read the rows of {producer.name} that it reads"
    rows = at.reshape(-1, at.shape[-1])[0]
    parts = [(producer, "weight"), (producer, "bias"), (consumer, "weight")]
    stored = [(arguments(user)[part], user) for user, part in parts]
    if any(part is not None and part.op != "get_attr" for part, _ in stored):
        return "a weight beside it is computed, not stored"
    if why := unfit(program, {str(part.target): [user] for part, user in stored if part is not None}):
        return why
    return Edge(matrix(consumer), reads[0].operand, columns, (consumer,), _rows(producer, rows))


def _rows(producer: fx.Node, rows: torch.Tensor) -> tuple[Made, ...]:
    """The rows of a product, and the entries of its bias."""
    stored = [arguments(producer)[part] for part in ("weight", "bias")]
    return tuple(Made(str(part.target), rows) for part in stored if part is not None)
