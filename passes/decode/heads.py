"""Heads that guess the tokens after the next one (Medusa, Cai et al., 2024; Blockwise Parallel Decoding, 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.ops import HEAD, LINEAR, arguments
from ...ir.program import Program
from ...ir.weight import Weight
from .._contracts import one_head
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable
from ._trees import best_tree, usual_rates


@dataclass(frozen=True)
class Heads(Pass):
    """Head j adds to the output `heads` [B, T, J, V] the logits for the token j + 1 places behind the next one.

    It is x + silu(W x) on the hidden state x that feeds the model's own head, then a projection to the vocabulary. W
    starts at zero and the projection as the model's own, so that untrained heads repeat the next token: correct, but no
    faster, until train.heads has run. `logits` are untouched.

    heads: how many tokens ahead are guessed, J.
    width: candidates taken from each head; 1 drafts a chain.
    nodes: drafted tokens verified in a step, the pending token not counted.
    projection: `own` for each head as Medusa has it, or `tied`: all share the model's head, as in Blockwise Parallel
        Decoding, which saves J · V · K parameters and trains worse.
    shared: neurons of one layer that all heads read, so that a head is x + W relu(U x), as in Blockwise Parallel
        Decoding; 0: each head has its own square W, as in Medusa.
    dtype: how own weights are stored.

    Deviations: acceptance is by the walk, which keeps the model's law when sampling; Medusa's typical acceptance does
    not, nor does Blockwise Parallel Decoding's approximate one. Both can be had by decode.relax.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"outputs", "decode"})

    heads: int = 4
    width: int = 10
    nodes: int = 31  # 32 rows a step, with the pending token
    projection: Literal["own", "tied"] = "own"
    shared: int = 0
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.shared < 0:
            raise SmeltError(f"shared counts neurons, and is not {self.shared}")
        if min(self.heads, self.width, self.nodes) < 1:
            raise SmeltError(f"heads, width and nodes count from 1, not {self.heads}, {self.width} and {self.nodes}")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not draft by heads yet, and one vocabulary head."""
        yield from joinable(program, decode.Heads)
        taken = [name for name in (*program.outputs, *program.weights) if name == "heads" or name.startswith("heads.")]
        drafting = program.decode is not None and any(type(p) is decode.Heads for p in program.decode.draft.parts)
        if taken and not drafting:
            yield f"{program.name} must not use the name '{taken[0]}', which stands for decoding heads"
        if not taken:
            yield from one_head(program)
        vocabulary = program.facts.get("vocabulary", self.width)
        if vocabulary < self.width:
            yield f"width must be at most the vocabulary of {vocabulary} tokens, but is {self.width}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the heads' nodes behind everything else, their weights, and the decode plan."""
        (head,) = program.calls(HEAD)
        before = set(program.weights)
        with program.graph.inserting_before(next(iter(reversed(program.graph.nodes)))):
            layer = self._layer(program, head) if self.shared else None
            guesses = [self._head(program, head, layer, j) for j in range(self.heads)]
            stacked = program.graph.call_function(torch.ops.aten.stack.default, (guesses, -2))
        program.set_output("heads", stacked)
        tree = best_tree([usual_rates(self.width)] * self.heads, self.nodes)
        join(program, decode.Heads(tree, self.width))
        program.facts["heads_trained"] = False
        added = sorted(set(program.weights) - before)
        program.touch(*added)
        notes = {
            "parameters": sum(program.weights[name].parts["data"].numel() for name in added),
            "bytes": sum(program.weights[name].nbytes for name in added),
        }
        return Outcome(tuple(f"heads.{j}" for j in range(self.heads)), notes=notes)

    def _layer(self, program: Program, head: fx.Node) -> fx.Node:
        """The layer that all heads read: relu(U x), at the insert point; U is drawn, for W is zero at first."""
        a = arguments(head)
        width = program.weights[str(a["weight"].target)].shape[1]
        drawn = torch.randn(self.shared, width, generator=torch.Generator().manual_seed(0)) * (2 / width) ** 0.5
        up = program.weight_node("heads.layer.weight", self._weight(drawn))
        linear = program.graph.call_function(LINEAR.target, (a["x"], up))
        return program.graph.call_function(torch.ops.aten.relu.default, (linear,))

    def _head(self, program: Program, head: fx.Node, layer: fx.Node | None, j: int) -> fx.Node:
        """Head j's nodes at the insert point: the residual block, then the projection."""
        graph, a = program.graph, arguments(head)
        hidden = a["x"]
        projection, bias = str(a["weight"].target), a["bias"] and str(a["bias"].target)
        width = program.weights[projection].shape[1]
        zero = self._weight(torch.zeros(width, self.shared or width))
        block = program.weight_node(f"heads.{j}.block.weight", zero)
        inner = graph.call_function(LINEAR.target, (hidden if layer is None else layer, block))
        if layer is None:
            inner = graph.call_function(torch.ops.aten.silu.default, (inner,))
        added = graph.call_function(torch.ops.aten.add.Tensor, (hidden, inner))
        operands: list[Any] = [added]
        for part, name in (("weight", projection), ("bias", bias)):
            if name is not None:
                operands.append(self._own(program, f"heads.{j}.projection.{part}", name))
        return graph.call_function(HEAD.target, tuple(operands))

    def _own(self, program: Program, name: str, source: str) -> fx.Node:
        """A node that reads the model's own weight, or a copy of it under a name of its own."""
        if self.projection == "tied":
            return program.weight_node(source)
        return program.weight_node(name, self._weight(program.weights[source].dense().clone()))

    def _weight(self, value: torch.Tensor) -> Weight:
        return Weight.of(value.to(getattr(torch, self.dtype)))
