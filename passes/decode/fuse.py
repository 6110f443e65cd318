"""A layer that fuses the last three tokens with the model's features, and heads that guess ahead (Chimera, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...ir import decode
from ...ir.blocks import blocks
from ...ir.errors import SmeltError
from ...ir.ops import EMBEDDING, HEAD, LINEAR, arguments, is_op
from ...ir.program import Program
from .._contracts import one_head
from ..base import Outcome, Samples
from ._join import join, joinable
from ._layer import FEATURES, Layered
from ._trees import best_tree, usual_rates
from .prompts import readers

BEFORE = "before"  # the draft's input [B, T, 2]: the two tokens in front of each
HEADS = "feature.heads"  # begins the names of the matrices of heads, [K, 2 K]
aten = torch.ops.aten


@dataclass(frozen=True)
class Fuse(Layered):
    """A draft model of one layer that guesses the next `heads` tokens behind the pending one in one pass.

    A feature [B, T, K] is the state behind the model's last layer, in front of its last norm; the model gives it out as
    `features`. At place t a trigram encoder, y + silu(W y) on the embeddings y of the tokens t - 1 to t + 1, stands
    beside the feature of t. Both go behind a norm and a matrix into a layer like the model's last one; what comes out
    stands for the feature of t + 1. Head j is a matrix [K, 2 K] of the two features, of t and of t + 1, each behind the
    model's last norm, to a state from which the model's own head gives the law of the token t + 2 + j. Embedding, norm
    and head are the model's. It drafts badly until train.fuse has run.

    heads: how many tokens ahead are guessed, J.
    width: candidates taken from each head.
    nodes: drafted tokens verified in a step, the pending token not counted.
    dtype: how the weights that are added, and the layer's keys and values, are stored.

    Deviations from the released code: it gives each head a projection [V, 2 K] of its own, 16 times as large on the
    reference model. It puts features and trigrams one behind the other into the layer, each with keys and values of
    their own; here they enter as one sum, which halves the cache. It runs the layer once more for every head, behind
    the best guess of the head before; here one pass serves all. The layer starts as the model's last one.
    """

    heads: int = 4
    width: int = 10
    nodes: int = 31  # 32 rows a step, with the pending token

    def __post_init__(self) -> None:
        if min(self.heads, self.width, self.nodes) < 1:
            raise SmeltError(f"heads, width and nodes count from 1, not {self.heads}, {self.width} and {self.nodes}")

    def requires(self, program: Program) -> Iterator[str]:
        """What a layer over features needs, one embedding of tokens, one vocabulary head, and no such drafter yet."""
        yield from super().requires(program)
        yield from joinable(program, decode.Fused)
        yield from one_head(program)
        if not (len(found := readers(program)) == 1 and is_op(found[0], EMBEDDING)):
            yield f"{program.name} must read its tokens in one embedding and nowhere else"
        vocabulary = program.facts.get("vocabulary", self.width)
        if vocabulary < self.width:
            yield f"width must be at most the vocabulary of {vocabulary} tokens, but is {self.width}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the draft model, the output that it reads, and the decode plan; the graph stays as it is otherwise."""
        draft, last = self.layer(program), blocks(program)[-1]
        width = int(last.add.meta["shape"][-1])
        features = self.input(draft, FEATURES, width, "float32")
        trigrams = self._trigrams(draft, width)
        sides = {"token": (trigrams, torch.zeros(width, 3 * width)), "feature": (features, torch.eye(width))}
        self.project(draft, sides)
        draft.set_output(FEATURES, blocks(draft)[-1].add)
        self._look_ahead(draft, features, width)
        join(program, decode.Fused(best_tree([usual_rates(self.width)] * self.heads, self.nodes), self.width))
        return self.attach(program, draft)

    def _trigrams(self, draft: Program, width: int) -> fx.Node:
        """The encoder of each token and the two in front, [B, T, 3 K], which at first gives their embeddings."""
        graph, (words,) = draft.graph, readers(draft)
        tokens = next(node for node in graph.find_nodes(op="placeholder") if node.target == "tokens")
        before = self.input(draft, BEFORE, 2, "int64")
        with graph.inserting_before(words):
            last = graph.call_function(aten.unsqueeze.default, (tokens, -1))
            three = graph.call_function(aten.cat.default, ([before, last], -1))
            table = draft.weight_node(str(arguments(words)["weight"].target))
            found = graph.call_function(EMBEDDING.target, (three, table))
            flat = graph.call_function(aten.flatten.using_ints, (found, -2))
            matrix = self.add(draft, "feature.trigram", torch.zeros(3 * width, 3 * width))
            inner = graph.call_function(aten.silu.default, (graph.call_function(LINEAR.target, (flat, matrix)),))
            return graph.call_function(aten.add.Tensor, (flat, inner))

    def _look_ahead(self, draft: Program, features: fx.Node, width: int) -> None:
        """Let the model's head read the states [B, T, J, K] of all heads, which at first are all the layer's own."""
        draft.facts["ahead"] = self.heads
        (head,) = draft.calls(HEAD)
        state, graph = arguments(head)["x"], draft.graph
        with graph.inserting_before(head):
            known = _again(graph, state, blocks(draft)[-1].add, features)
            both = graph.call_function(aten.cat.default, ([known, state], -1))
            start = torch.cat([torch.zeros(width, width), torch.eye(width)], 1)
            matrices = [self.add(draft, f"{HEADS}.{j}", start.clone()) for j in range(self.heads)]
            states = [graph.call_function(LINEAR.target, (both, matrix)) for matrix in matrices]
            stacked = graph.call_function(aten.stack.default, (states, -2))
        head.replace_input_with(state, stacked)


def _again(graph: fx.Graph, node: fx.Node, start: fx.Node, other: fx.Node) -> fx.Node:
    """What `node` makes of `start` alone, made of `other` at the insert point."""
    if node is start:
        return other
    above = node.all_input_nodes[0]  # the state; what else is read are weights and sizes
    made = _again(graph, above, start, other)
    return graph.node_copy(node, lambda each: made if each is above else each)
