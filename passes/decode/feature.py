"""One more layer that drafts from the model's own features (EAGLE: Rethinking Feature Uncertainty, Li et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.blocks import blocks
from ...ir.errors import SmeltError
from ...ir.ops import LINEAR, RMS_NORM
from ...ir.program import Program
from ..base import Outcome, Samples
from ._layer import EPSILON, FEATURES, Layered

AHEAD = "feature.ahead"  # begins the names of the weights that give further states
INNER = 4  # width of the layer inside, in widths of the model


@dataclass(frozen=True)
class Feature(Layered):
    """A draft model of one layer that guesses the model's next feature, and through the model's head the next token.

    A feature [B, T, K] is the state behind the model's last layer, in front of its last norm; the model gives it out as
    `features`. At place t the draft reads the feature of t and the embedding of the token at t + 1, each behind a norm,
    projects both to K, and goes through a layer like the model's last one; what comes out stands for the feature of
    t + 1. Where no feature is known yet it takes its own. Embedding, last norm and head are the model's. It drafts when
    decode.draft comes behind it, and drafts badly until train.feature has run.

    ahead: states that a pass gives, one place further each (FLASH, 2025), so that as many tokens are drafted before the
        next pass; 1 is EAGLE. The first is the layer's; the others are a matrix of it and what a network makes of it.
    dtype: how its own weights and its keys and values are stored.

    Deviations: the layer starts as the model's last one, with its normalisation, where the released code starts anew.
    Features are taken in front of the last norm, which the draft then shares; the released code's lie behind it. The
    norms in front of the projection are EAGLE-3's.
    """

    ahead: int = 1

    def __post_init__(self) -> None:
        if self.ahead < 1:
            raise SmeltError(f"ahead counts the states of a pass from 1, not {self.ahead}")

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the draft model and the output that it reads; the graph stays as it is otherwise."""
        draft, last = self.layer(program), blocks(program)[-1]
        width = int(last.add.meta["shape"][-1])
        features = self.input(draft, FEATURES, width, "float32")
        sides = {"token": (blocks(draft)[0].input, torch.zeros(width, width)), "feature": (features, torch.eye(width))}
        self.project(draft, sides)
        state = blocks(draft)[-1].add
        draft.set_output(FEATURES, state)
        if self.ahead > 1:
            self._look_ahead(draft, state, width)
        return self.attach(program, draft)

    def _look_ahead(self, draft: Program, state: fx.Node, width: int) -> None:
        """Let all that reads the state [B, T, K] read the states [B, T, ahead, K]; at first they are all alike."""
        draft.facts["ahead"] = self.ahead
        for node in draft.calls(torch.ops.aten.view.default, torch.ops.aten.reshape.default):
            if node.meta["shape"] == node.all_input_nodes[0].meta["shape"]:  # it would undo what is stacked here
                node.replace_all_uses_with(node.all_input_nodes[0])
        graph, readers = draft.graph, list(state.users)
        drawn = torch.randn(INNER * width, width, generator=torch.Generator().manual_seed(0)) * (2 / width) ** 0.5
        with graph.inserting_before(state.next):
            norm = self.add(draft, f"{AHEAD}.norm", torch.ones(width))
            normed = graph.call_function(RMS_NORM.target, (state, norm, EPSILON, 0.0))
            inner = graph.call_function(LINEAR.target, (normed, self.add(draft, f"{AHEAD}.inner", drawn)))
            inner = graph.call_function(torch.ops.aten.silu.default, (inner,))
            states = [state]
            for j in range(1, self.ahead):
                starts = (state, torch.eye(width), "straight"), (inner, torch.zeros(width, INNER * width), "bent")
                parts = [
                    graph.call_function(LINEAR.target, (source, self.add(draft, f"{AHEAD}.{j}.{part}", start)))
                    for source, start, part in starts
                ]
                states.append(graph.call_function(torch.ops.aten.add.Tensor, tuple(parts)))
            stacked = graph.call_function(torch.ops.aten.stack.default, (states, -2))
        for reader in readers:
            reader.replace_input_with(state, stacked)
