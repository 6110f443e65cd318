"""Trains the layer that drafts from features (EAGLE, Li et al., 2024), along its own drafts (EAGLE-3, 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Outcome, Samples, decoder_only
from ..decode._join import exchange
from ..decode._layer import FEATURES
from ..decode._trees import best_tree, expected_tokens
from ._loop import store
from ._text import windows
from ._training import DraftTraining
from ._unroll import Unroll

RANKS = 4  # candidates behind a node that a fitted tree chooses among


@dataclass(frozen=True)
class Feature(DraftTraining):
    """The layer of decode.feature learns the model's law of the next tokens; a tree in place is fitted to its hits.

    The model is frozen. Before the first update the projection is set, by least squares, to what the model's own last
    layer reads. The loss is cross-entropy with the model's law on its eight likeliest tokens.

    rounds: drafted tokens that are unrolled in training, each pass behind the draft's own features; 1 is EAGLE-1.
    smooth: weight of the smooth L1 distance between the draft's features and the model's; EAGLE-1 has 10 times that of
        cross-entropy, EAGLE-3 none.

    Deviations: the papers train on chats, for days. EAGLE-1 adds noise to features, which unrolling makes needless.
    """

    rounds: int = 3
    smooth: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise SmeltError(f"rounds counts from 1, not {self.rounds}")

    def requires(self, program: Program) -> Iterator[str]:
        """An untrained draft model over the program's features, whose own weights are Dense."""
        yield from decoder_only(program)
        draft = program.draft
        if draft is None or FEATURES not in draft.inputs or FEATURES not in program.outputs:
            yield f"{program.name} must have a draft model over its features: put decode.feature in front"
            return
        if draft.facts["trained"]:
            yield f"the draft model of {program.name} must be untrained, but is trained: train it once"
        if self.rounds < (ahead := draft.facts.get("ahead", 1)):
            yield f"rounds must be {ahead} or more, the states that a pass of the draft gives, but is {self.rounds}"
        for name in draft.facts["own"]:
            if not isinstance(draft.weights[name].encoding, Dense):
                yield f"{name} must be Dense to be trained, but is {draft.weights[name].encoding}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the weights in the type they had, and fit the tree if the draft has one."""
        draft, plan = program.draft, program.decode
        if samples is None or draft is None:
            raise SmeltError("train.feature needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, self.rounds + 2, self.holdout, "train.feature")
        unroll = Unroll.of(program, learn, held, self.rounds, self.decay, self.smooth)
        went = self.train(unroll, learn, program, samples, "drafter")
        store(unroll, draft.weights)
        draft.facts["trained"] = True
        program.touch("draft")
        model = next((p for p in plan.draft.parts if isinstance(p, decode.Model)), None) if plan else None
        depth = max(model.tree.depths) if model and model.tree else self.rounds
        hits = unroll.hits(min(depth, learn.shape[1] - 2), RANKS)
        notes = {"hits": [[round(rate, 4) for rate in ranks] for ranks in hits], **went.to_dict()}
        if plan and model and model.tree:
            tree = best_tree(hits, len(model.tree) - 1)
            program.decode = exchange(plan, model, replace(model, tree=tree))
            program.touch("decode")
            notes["expected_tokens_per_step"] = round(expected_tokens(hits, tree), 3)
        return Outcome(("draft",), notes=notes)
