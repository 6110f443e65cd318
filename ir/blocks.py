"""Residual blocks of a decoder: what each adds to the stream, so that it can be left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from .cache.plan import CachePlan
from .depth import Stage
from .ops import ATTENTION, CACHED_ATTENTION, arguments, is_op
from .program import Program

ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Block:
    """`add` sums the stream, its operand number `stream`, and what the block computes from it; layers count from 0."""

    add: fx.Node
    stream: int
    kind: Literal["attention", "feedforward"]
    layer: int

    @property
    def input(self) -> fx.Node:
        """The stream in front of the block."""
        stream = self.add.args[self.stream]
        assert isinstance(stream, fx.Node)
        return stream

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind}"


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


def without(program: Program, left_out: Iterable[Block]) -> None:
    """Take blocks out of a program, their weights and cache sites too."""
    _take_out(program, left_out)
    if program.cache is not None:
        layers = attended(program)
        sites = tuple(site for site in program.cache.sites if site.layer in layers)
        tables = {name: t for name, t in program.cache.tables.items() if int(name.split(".")[0]) in layers}
        program.cache = CachePlan(sites).with_tables(tables) if tables else CachePlan(sites)


def stages(program: Program) -> list[Program]:
    """What a program with a depth plan runs in each stage; weights and the cache plan are its own."""
    out = []
    for stage in program.depth.stages if program.depth is not None else ():
        shallow = replace(program, draft=None, depth=None).fork()
        _take_out(shallow, [block for block in blocks(shallow) if rests(stage, block)])
        out.append(shallow)
    return out


def rests(stage: Stage, block: Block) -> bool:
    """Whether a stage leaves a block out."""
    return block.layer in (stage.attention if block.kind == "attention" else stage.feedforward)


def attended(program: Program) -> frozenset[int]:
    """The cache sites that a program reads, by layer."""
    return frozenset(int(arguments(node)["layer"]) for node in program.calls(CACHED_ATTENTION))


def renumber(program: Program) -> None:
    """Count cache sites from 0 again, in the order in which they are read, where some were taken out."""
    nodes = list(program.calls(CACHED_ATTENTION))
    new = {int(arguments(node)["layer"]): number for number, node in enumerate(nodes)}
    if program.cache is None or all(old == number for old, number in new.items()):
        return
    at = CACHED_ATTENTION.arguments.index("layer")
    for number, node in enumerate(nodes):
        node.args = (*node.args[:at], number, *node.args[at + 1 :])
    named = (name.split(".", 1) for name in program.cache.tables)
    tables = {f"{new[int(layer)]}.{rest}": program.cache.tables[f"{layer}.{rest}"] for layer, rest in named}
    plan = CachePlan(tuple(replace(site, layer=new[site.layer]) for site in program.cache.sites))
    program.cache = plan.with_tables(tables) if tables else plan


def _take_out(program: Program, left_out: Iterable[Block]) -> None:
    for block in left_out:
        block.add.replace_all_uses_with(block.input)
        program.graph.erase_node(block.add)
    program.prune()
