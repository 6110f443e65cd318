"""Residual blocks of a decoder: what each adds to the stream, so that it can be left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ...ir.cache import CachePlan
from ...ir.ops import ATTENTION, CACHED_ATTENTION, arguments, is_op
from ...ir.program import Program

ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Block:
    """`add` sums the stream, its operand number `stream`, and what the block computes from it; layers count from 0."""

    add: fx.Node
    stream: int
    kind: Literal["attention", "feedforward"]
    layer: int


def blocks(program: Program) -> list[Block]:
    """The residual blocks in order: sums of a value and of something that depends on it.

    A sum that holds attention and a feed-forward part at once counts as attention.
    """
    reached: dict[fx.Node, int] = {}  # bits: the nodes above and the node itself
    order = {node: 1 << i for i, node in enumerate(program.graph.nodes)}
    attending = sum(bit for node, bit in order.items() if is_op(node, ATTENTION, CACHED_ATTENTION))
    found: list[Block] = []
    layer = -1
    for node in program.graph.nodes:
        above = order[node]
        for parent in node.all_input_nodes:
            above |= reached[parent]
        reached[node] = above
        if node.target is not ADD or not all(isinstance(x, fx.Node) for x in node.args[:2]):
            continue
        for at in (0, 1):
            stream, branch = node.args[at], node.args[1 - at]
            if branch is not stream and reached[branch] & order[stream]:
                attends = bool(reached[branch] & ~reached[stream] & attending)
                layer += attends
                if layer >= 0:
                    found.append(Block(node, at, "attention" if attends else "feedforward", layer))
                break
    return found


def without(program: Program, left_out: list[Block]) -> None:
    """Take blocks out of a program, their weights and cache sites too."""
    for block in left_out:
        stream = block.add.args[block.stream]
        assert isinstance(stream, fx.Node)
        block.add.replace_all_uses_with(stream)
        program.graph.erase_node(block.add)
    program.prune()
    if program.cache is not None:
        layers = {arguments(node)["layer"] for node in program.calls(CACHED_ATTENTION)}
        sites = tuple(site for site in program.cache.sites if site.layer in layers)
        tables = {name: t for name, t in program.cache.tables.items() if int(name.split(".")[0]) in layers}
        program.cache = CachePlan(sites).with_tables(tables) if tables else CachePlan(sites)
