"""The residual stream of a model: every value that has its coordinates, what writes to it and what reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.blocks import ADD, blocks
from ...ir.ops import EMBEDDING, EXPERTS, LAYER_NORM, LINEAR, RMS_NORM, arguments, is_op
from ...ir.program import Program
from ..prune._trace import SIZE, shape_of
from ._follow import Read, moved, moves

aten = torch.ops.aten
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class Stream:
    """A stream of `width` channels.

    writers: matrix products, lookups, routed experts and stored vectors that are added up in it.
    norms, products: what reads it; nothing else does.
    """

    width: int
    writers: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]

    def written(self) -> dict[str, tuple[int, set[fx.Node]]]:
        """The weights whose channels are the stream's as they are written: along which dim, and for which nodes."""
        found: dict[str, tuple[int, set[fx.Node]]] = {}
        for node in self.writers:
            if node.op == "get_attr":
                found[str(node.target)] = (-1, set(node.users))
                continue
            a = arguments(node)
            if is_op(node, EMBEDDING):
                parts = [(a["weight"], -1)]
            else:
                parts = [(a["down" if is_op(node, EXPERTS) else "weight"], -2), (a.get("bias"), -1)]
            for part, dim in parts:
                if part is not None:
                    found.setdefault(str(part.target), (dim, set()))[1].add(node)
        return found


def stream(program: Program) -> Stream | str:
    """The residual stream that a program's blocks add to, or why its coordinates cannot be changed.

    Needs derived shapes.
    """
    found = blocks(program)
    if not found:
        return f"{program.name} has no residual blocks"
    width = shape_of(found[0].add)[-1]
    ahead = [node for block in found for node in (block.add, block.input)]
    values: dict[fx.Node, None] = {}
    writers: dict[fx.Node, None] = {}
    norms: dict[fx.Node, None] = {}
    products: dict[fx.Node, None] = {}
    while ahead:
        node = ahead.pop()
        if node in values or node in writers:
            continue
        if _writes(node):
            writers[node] = None
        elif _sums(node, width):
            ahead.extend(_parts(node))
        else:
            return _stranger(node)
        if node.op == "get_attr":
            continue
        values[node] = None
        for user in node.users:
            read = Read(user, node, torch.arange(width))
            if user.target is SIZE or user in values:
                continue
            if is_op(user, RMS_NORM, LAYER_NORM):
                norms[user] = None
            elif read.multiplies:
                products[user] = None
            elif _sums(user, width):
                ahead.append(user)
            else:
                return f"{user.name} reads the residual stream, and is no norm and no matrix product"
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    parts = (tuple(sorted(part, key=order.__getitem__)) for part in (writers, norms, products))
    return Stream(width, *parts)


def _writes(node: fx.Node) -> bool:
    a = arguments(node) if is_op(node, LINEAR, EMBEDDING, EXPERTS) else {}
    stored = [a[name] for name in ("weight", "bias", "down") if a.get(name) is not None]
    return node.op == "get_attr" or (bool(stored) and all(part.op == "get_attr" for part in stored))


def _sums(node: fx.Node, width: int) -> bool:
    """Whether a node's channels are the same linear map of its operands' channels, each of its own."""
    if node.op != "call_function":
        return False
    if node.target is ADD:
        return all(isinstance(part, fx.Node) and shape_of(part)[-1:] == (width,) for part in node.args[:2])
    if node.target in _SCALES:
        return len(_parts(node)) == 1
    if not moves(node):
        return False
    source = node.all_input_nodes[0]
    if "shape" not in source.meta or shape_of(source)[-1:] != (width,):
        return False
    return Read(node, source, moved(node, torch.arange(width).expand(shape_of(source)))).in_place


def _parts(node: fx.Node) -> list[fx.Node]:
    """The operands that have channels; of a scaled value the one that is scaled."""
    if node.target in _SCALES:
        return [part for part in node.all_input_nodes if shape_of(part) not in ((), (1,))]
    return list(dict.fromkeys(node.args[:2])) if node.target is ADD else node.all_input_nodes[:1]  # type: ignore[arg-type]


def _stranger(node: fx.Node) -> str:
    if is_op(node, RMS_NORM, LAYER_NORM):
        return f"{node.name} normalises what is added to the residual stream"
    return f"{node.name} writes to the residual stream, and is no matrix product and no lookup"
