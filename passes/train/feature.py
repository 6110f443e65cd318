"""Trains the layer that drafts from features (EAGLE, Li et al., 2024), along its own drafts (EAGLE-3, 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only
from ..decode._join import exchange
from ..decode._trees import best_tree, expected_tokens
from ..decode.feature import FEATURES
from ._loop import Course, identity, store, train
from ._text import windows
from ._unroll import Unroll

RANKS = 4  # candidates behind a node that a fitted tree chooses among


@dataclass(frozen=True)
class Feature(Pass):
    """The layer of decode.feature learns the model's law of the next tokens; a tree in place is fitted to its hits.

    The model is frozen. Before the first update the projection is set, by least squares, to what the model's own last
    layer reads. The loss is cross-entropy with the model's law on its eight likeliest tokens.

    steps, batch, length, rate, seed: updates by AdamW, windows of text in each, tokens of a window, the largest rate,
        and the seed of the order of the windows.
    rounds: drafted tokens that are unrolled in training, each behind the draft's own features; 1 is EAGLE-1.
    decay: weight of a round relative to the one before it.
    smooth: weight of the smooth L1 distance between the draft's features and the model's; EAGLE-1 has 10 times that of
        cross-entropy, EAGLE-3 none.
    holdout: share of the windows that are not trained on; they decide which weights are kept, and the tree.
    checks: times that held-out loss is measured.

    Deviations: the papers train on chats, for days. EAGLE-1 adds noise to features, which unrolling makes needless.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})
    calibration: ClassVar[Literal["none", "text"]] = "text"

    steps: int = 300
    batch: int = 4
    length: int = 128
    rate: float = 1e-3
    rounds: int = 3
    decay: float = 0.8
    smooth: float = 0.1
    seed: int = 0
    holdout: float = 0.1
    checks: int = 8

    def __post_init__(self) -> None:
        self._course()
        if self.rounds < 1 or not 0 < self.holdout < 1:
            raise SmeltError(f"rounds counts from 1 and holdout is a share, not {self.rounds} and {self.holdout}")

    def requires(self, program: Program) -> Iterator[str]:
        """An untrained draft model over the program's features, whose own weights are Dense."""
        yield from decoder_only(program)
        draft = program.draft
        if draft is None or FEATURES not in draft.inputs or FEATURES not in program.outputs:
            yield f"{program.name} must have a draft model over its features: put decode.feature in front"
            return
        if draft.facts["trained"]:
            yield f"the draft model of {program.name} must be untrained, but is trained: train it once"
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
        went = train(unroll, len(learn), self._course(), samples, "drafter", identity(program, self, samples))
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

    def _course(self) -> Course:
        return Course(self.steps, self.batch, self.rate, seed=self.seed, checks=self.checks)
