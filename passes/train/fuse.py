"""Trains a layer that fuses tokens with the model's features, and its heads, with the model frozen (Chimera, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Outcome, Samples, decoder_only
from ..decode._join import exchange
from ..decode._trees import best_tree, expected_tokens
from ._fusion import Fusion
from ._loop import store
from ._text import windows
from ._training import DraftTraining


@dataclass(frozen=True)
class Fuse(DraftTraining):
    """The layer and the heads of decode.fuse learn the model's law some tokens ahead; the tree is fitted to their hits.

    The model is frozen. Before the first update projection and heads are set by least squares. The loss is
    cross-entropy with the model's law on its eight likeliest tokens, behind the text as it stands.

    Deviations: the released code trains on chats for two epochs, with the tokens that came as labels, and draws the
    layer's states to the model's by their mean square; here the labels are the model's law.
    """

    def requires(self, program: Program) -> Iterator[str]:
        """An untrained drafter by decode.fuse whose own weights are Dense."""
        yield from decoder_only(program)
        draft = program.draft
        if _drafting(program) is None or draft is None:
            yield f"{program.name} must draft by a layer with heads: put decode.fuse in front"
            return
        if draft.facts["trained"]:
            yield f"the draft model of {program.name} must be untrained, but is trained: train it once"
        for name in draft.facts["own"]:
            if not isinstance(draft.weights[name].encoding, Dense):
                yield f"{name} must be Dense to be trained, but is {draft.weights[name].encoding}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the weights in the type they had, and fit the tree."""
        draft, plan, drafts = program.draft, program.decode, _drafting(program)
        if samples is None or draft is None or plan is None or drafts is None:
            raise SmeltError("train.fuse needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, draft.facts["ahead"] + 2, self.holdout, "train.fuse")
        fusion = Fusion.of(program, self.decay, learn, held)
        fusion.fit(program)
        went = self.train(fusion, learn, program, samples, "drafter")
        store(fusion, draft.weights)
        draft.facts["trained"] = True
        hits = fusion.hits(drafts.width)
        tree = best_tree(hits, len(drafts.tree) - 1)
        program.decode = exchange(plan, drafts, replace(drafts, tree=tree))
        program.touch("draft", "decode")
        notes = {
            "hits": [[round(rate, 4) for rate in ranks] for ranks in hits],
            **went.to_dict(),
            "expected_tokens_per_step": round(expected_tokens(hits, tree), 3),
        }
        return Outcome(("draft",), notes=notes)


def _drafting(program: Program) -> decode.Fused | None:
    """The program's drafting by a layer with heads."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Fused)), None)
