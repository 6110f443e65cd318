"""Trains decoding heads on text with the model frozen (Medusa-1: Simple LLM Inference Acceleration Framework, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only
from ..decode._join import exchange, names
from ..decode._trees import best_tree, expected_tokens
from ._drill import Drill, trained
from ._loop import Course, identity, store, train
from ._text import windows


@dataclass(frozen=True)
class Heads(Pass):
    """Head j learns the token j + 2 places on; the draft tree is then fitted to how often its guesses are right.

    The loss is cross-entropy, weighted by decay^j: with the tokens of the text, and with what the model would write,
    which is known wherever the text is what the model would have chosen.

    steps: updates by AdamW, with a short warm-up and a cosine to zero.
    batch: windows of text in an update.
    length: tokens of a window.
    rate: largest learning rate.
    decay: weight of a head's loss relative to the head before it.
    own: share of the loss that is with what the model would write, greedily; 0 learns the text alone.
    seed: of the order of the windows.
    holdout: share of the windows that are not trained on; they decide which weights are kept, and the tree.
    checks: times that held-out loss is measured, for the curve; the weights of the lowest are kept.

    Deviations: heads learn the given text and the model's own choices for it, not whole chats of its own. Projections
    start from a least-squares guess of the states to come, not as copies of the model's. The paper searches the tree
    for one model once; here it is best-first under this model's own held-out hit rates.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT  # of the logits: only the output `heads` changes
    effects: ClassVar[frozenset[Effect]] = frozenset({"outputs", "decode"})
    calibration: ClassVar[Literal["none", "text"]] = "text"

    steps: int = 200
    batch: int = 8
    length: int = 128
    rate: float = 1e-3
    decay: float = 0.8
    own: float = 0.5
    seed: int = 0
    holdout: float = 0.1
    checks: int = 8

    def __post_init__(self) -> None:
        self._course()
        if self.length < 1:
            raise SmeltError(f"length counts from 1, not {self.length}")
        if not 0 <= self.own <= 1:
            raise SmeltError(f"own is a share of the loss between 0 and 1, not {self.own}")
        if not 0 < self.holdout < 1:
            raise SmeltError(f"holdout is a share of the text between 0 and 1, not {self.holdout}")

    def requires(self, program: Program) -> Iterator[str]:
        """Untrained heads whose weights are Dense."""
        yield from decoder_only(program)
        since = program.changed_by("decode")
        if _drafting(program) is None or "heads" not in program.outputs:
            has = f"decodes by {names(program.decode)}" if program.decode else "has no drafter"
            yield f"{program.name} must decode by heads, but {has}{since}: put decode.heads in front"
            return
        if program.facts.get("heads_trained"):
            yield f"the heads of {program.name} must be untrained, but are trained{since}: train them once"
        for name in trained(program):
            encoding = program.weights[name].encoding
            if not isinstance(encoding, Dense):
                yield (
                    f"{name} must be Dense to be trained, but is {encoding}{program.changed_by(name)}: "
                    "move train.heads in front"
                )
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the weights in the type they had, and replace the draft tree."""
        plan, draft = program.decode, _drafting(program)
        if samples is None or plan is None or draft is None:
            raise SmeltError("train.heads needs sample texts: pass texts to train on, or calibration texts, to compile")
        heads = program.outputs["heads"].all_input_nodes
        learn, held = windows(samples, self.length, len(heads) + 2, self.holdout, "train.heads")
        drill = Drill.of(program, self.decay, self.own, learn, held)
        before = drill.measure(draft.width)
        drill.fit()
        went = train(drill, len(learn), self._course(), samples, "heads", identity(program, self, samples))
        store(drill, program.weights)
        after = drill.measure(draft.width)
        tree = best_tree(after.hits, len(draft.tree) - 1)
        program.decode = exchange(plan, draft, replace(draft, tree=tree))
        program.facts["heads_trained"] = True
        program.touch("decode", *drill.weights)
        notes = {
            "before": before.to_dict(),
            "after": after.to_dict(),
            **went.to_dict(),
            "held_out_tokens": held.numel(),
            "expected_tokens_per_step": round(expected_tokens(after.hits, tree), 3),
            "nodes": len(tree) - 1,
        }
        return Outcome(tuple(f"heads.{j}" for j in range(drill.heads)), notes=notes)

    def _course(self) -> Course:
        return Course(self.steps, self.batch, self.rate, seed=self.seed, checks=self.checks)


def _drafting(program: Program) -> decode.Heads | None:
    """The program's drafting by heads."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Heads)), None)
