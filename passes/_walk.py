"""Samples on their way through a model: what reaches a node, with the nodes before it as they are by then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ..ir.blocks import blocks
from ..ir.errors import SmeltError
from ..ir.interpret import call, left_out
from ..ir.program import Program
from .base import Samples

TOKENS, ROWS = 4096, 32  # of one piece of text, and of other samples

Values = dict[fx.Node, Any]


class Walk:
    """Runs a program over samples up to nodes that are asked for in graph order, while a pass edits what follows.

    A weight may change until a node behind its residual block is asked for: blocks are run once more when they are
    left, so that those behind see what is left of those before. Only what goes from one block to the next is held, for
    all of the samples.
    """

    def __init__(self, program: Program, samples: Samples) -> None:
        self.program = program
        tokens = samples.inputs.get("tokens")
        rows = ROWS if tokens is None else max(1, TOKENS // tokens.shape[1])
        pieces = (samples.rows(slice(at, at + rows)) for at in range(0, len(samples), rows))
        places = {str(node.target): node for node in program.graph.nodes if node.op == "placeholder"}
        found = (given(program, piece.inputs) for piece in pieces)
        self._held: list[Values] = [{places[name]: value for name, value in each.items()} for each in found]
        self._last: fx.Node | None = None  # everything up to it has been run for good

    @torch.no_grad()
    def values(self, *nodes: fx.Node) -> Iterator[tuple[Any, ...]]:
        """The values of nodes of one block [B, T, …], for one piece of the samples after the other.

        Raises SmeltError for numbers that are not finite, and ValueError for a node that was passed by.
        """
        self._leave(nodes)
        order = self._behind()
        needed = _needed(order, nodes)
        if passed := [node.name for node in nodes if node not in needed and node not in self._held[0]]:
            raise ValueError(f"{', '.join(passed)} stands before {self._last}, which the walk has left")
        weights: Values = {}
        for held in self._held:
            values = self._run(needed, held, weights, set(nodes))
            found = tuple(values[node] for node in nodes)
            for node, value in zip(nodes, found, strict=True):
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise SmeltError(f"{node.name}: the samples give activations that are not finite")
            yield found

    def _behind(self) -> list[fx.Node]:
        """The calls that have not been run for good, in order."""
        order = list(self.program.graph.nodes)
        start = order.index(self._last) + 1 if self._last is not None else 0
        return [node for node in order[start:] if node.op not in ("placeholder", "get_attr", "output")]

    def _leave(self, nodes: tuple[fx.Node, ...]) -> None:
        """Run the blocks that stand before all of `nodes` for good."""
        order = self._behind()
        first = min((order.index(node) for node in nodes if node in order), default=0)
        ends = {block.add for block in blocks(self.program)}
        last = max((i for i, node in enumerate(order[:first]) if node in ends), default=-1)
        if last < 0:
            return
        run, rest = order[: last + 1], {*order[last + 1 :]}
        weights: Values = {}
        for i, held in enumerate(self._held):
            alive = {node for node in (*held, *run) if any(user in rest or user.op == "output" for user in node.users)}
            values = self._run(run, held, weights, alive)
            self._held[i] = {node: value for node, value in values.items() if node in alive}
        self._last = run[-1]

    def _run(self, nodes: list[fx.Node], held: Values, weights: Values, keep: set[fx.Node]) -> Values:
        """`held` and the values of `nodes`; of the latter only `keep` outlives its last reader."""
        values = dict(held)
        last = {used: node for node in nodes for used in node.all_input_nodes}

        def read(node: fx.Node) -> Any:
            if node.op != "get_attr":
                return values[node]
            if node not in weights:
                weights[node] = self.program.weights[str(node.target)].dense()
            return weights[node]

        for node in nodes:
            values[node] = call(node, fx.node.map_arg(node.args, read), fx.node.map_arg(node.kwargs, read))
            for used in node.all_input_nodes:
                if last[used] is node and used not in keep and used not in held:
                    values.pop(used, None)
        return values


def given(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All that a program reads, by name, for some samples; of texts int64 [B, T] there follow other inputs.

    Raises SmeltError for an input that the samples do not give.
    """
    known = dict(inputs)
    if (tokens := inputs.get("tokens")) is not None:
        follow = {"positions": torch.arange(tokens.shape[1]).expand(tokens.shape), "mask": torch.ones_like(tokens)}
        known = {**left_out(program, inputs), **follow, **inputs}
    if missing := [name for name in program.inputs if name not in known]:
        raise SmeltError(f"{program.name} reads '{missing[0]}', which the samples do not give")
    return {name: known[name] for name in program.inputs}


def _needed(order: list[fx.Node], nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Those of `order` that `nodes` are computed from, themselves among them."""
    wanted = set(nodes)
    for node in reversed(order):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in order if node in wanted]
