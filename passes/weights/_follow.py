"""Follows channels from a value to what computes with them, past nodes that only move elements."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.encoding import Dense
from ...ir.ops import EMBEDDING, EXPERTS, HEAD, LINEAR, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..prune._trace import CASTS, MOVES, SIZE, Labels, move, shape_of


@dataclass(frozen=True)
class Read:
    """`node` computes with `operand`; the numbers of the channels there have the operand's shape."""

    node: fx.Node
    operand: fx.Node
    numbers: Labels

    @property
    def columns(self) -> torch.Tensor | None:
        """The channel at each place of the last dim, int64 [K]; None where that differs between rows."""
        if not isinstance(self.numbers, torch.Tensor):
            return None
        rows = self.numbers.reshape(-1, self.numbers.shape[-1])
        return rows[0] if bool((rows == rows[0]).all()) else None

    @property
    def in_place(self) -> bool:
        """Whether each channel stands where it stood."""
        found = self.columns
        return found is not None and torch.equal(found, torch.arange(len(found)))

    @property
    def multiplies(self) -> bool:
        """Whether the node multiplies it with stored matrices."""
        if not is_op(self.node, LINEAR, HEAD, EXPERTS):
            return False
        a = arguments(self.node)
        named = ("gate_up", "down") if is_op(self.node, EXPERTS) else ("weight", "bias")
        stored = all(a[name] is None or a[name].op == "get_attr" for name in named)
        return stored and all(value is not self.operand for name, value in a.items() if name != "x")


def follow(node: fx.Node, numbers: torch.Tensor | None = None) -> list[Read]:
    """Who computes with a value whose channels have these numbers; without, they are counted along its last dim.

    Needs derived shapes.
    """
    if numbers is None:
        numbers = torch.arange(shape_of(node)[-1]).expand(shape_of(node))
    found: list[Read] = []
    ahead: list[tuple[fx.Node, Labels]] = [(node, numbers)]
    while ahead:
        at, known = ahead.pop()
        for user in at.users:
            if user.target is SIZE:
                continue
            if moves(user):
                ahead.append((user, moved(user, known)))
            else:
                found.append(Read(user, at, known))
    return found


def rows_at(producer: fx.Node, node: fx.Node, operand: fx.Node) -> torch.Tensor | None:
    """Which row of a matrix product each place of an operand is; None if others than `node` read one of them."""
    found, others = None, []
    for read in follow(producer):
        if read.node is node and read.operand is operand and isinstance(read.numbers, torch.Tensor):
            found = read.numbers
        else:
            others.extend(read.numbers if isinstance(read.numbers, list) else [read.numbers])
    if found is None or any(bool(torch.isin(other, found).any()) for other in others):
        return None
    return found


def products(node: fx.Node) -> list[fx.Node] | str:
    """The matrix products that read a value, each channel in its place, or what else reads it."""
    found = follow(node)
    others = dict.fromkeys(read.node.name for read in found if not (read.multiplies and read.in_place))
    if others or not found:
        return f"read by {', '.join(others) or 'nothing'}, and no matrix product"
    return list(dict.fromkeys(read.node for read in reversed(found)))


def moves(node: fx.Node) -> bool:
    """Whether a node's results are elements of its first operand, chosen by place alone."""
    others = node.all_input_nodes[1:]
    return node.target in CASTS or (node.target in MOVES and all("value" in other.meta for other in others))


def moved(node: fx.Node, numbers: Labels) -> Labels:
    """The numbers behind a node that moves its operand."""
    return numbers if node.target in CASTS else move(node, node.args, {node.all_input_nodes[0]: numbers})


def behind(node: fx.Node) -> fx.Node:
    """What computed a value: the nearest node above that does more than move elements."""
    while moves(node):
        node = node.all_input_nodes[0]
    return node


def matrix(node: fx.Node) -> str:
    """The weight whose columns stand for the channels that a product reads."""
    return str(arguments(node)["gate_up" if is_op(node, EXPERTS) else "weight"].target)


def unfit(program: Program, readers: Mapping[str, Collection[fx.Node]]) -> str | None:
    """Why weights cannot be changed as these readers of theirs take it, or None."""
    for name, known in readers.items():
        others = [user for user in program.uses(name) if user not in known]
        if others:
            way = ": put weights.untie in front" if any(is_op(user, HEAD, EMBEDDING) for user in others) else ""
            return f"{name} is also read by {', '.join(user.name for user in others)}{way}"
        weight = program.weights[name]
        if not isinstance(weight.encoding, Dense):
            return f"{name} must be Dense, but is {weight.encoding}{program.changed_by(name)}"
    return None


def wide(program: Program, name: str) -> torch.Tensor:
    """A weight in float64."""
    return program.weights[name].dense(torch.float64)


def store(program: Program, name: str, value: torch.Tensor) -> None:
    """A weight anew, in float32: what was a number of half precision is none any more."""
    program.weights[name] = Weight.of(value.float().contiguous())
    program.touch(name)
