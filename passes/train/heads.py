"""Trains decoding heads on text with the model frozen (Medusa-1: Simple LLM Inference Acceleration Framework, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Outcome, Samples, decoder_only
from ..decode._join import exchange, names
from ..decode._trees import best_tree, expected_tokens
from ._drill import Drill, trained
from ._loop import store
from ._text import windows
from ._training import DraftTraining


@dataclass(frozen=True)
class Heads(DraftTraining):
    """Head j learns the token j + 2 places on; the draft tree is then fitted to how often its guesses are right.

    The loss is cross-entropy, weighted by decay^j: with the tokens of the text, and with what the model would write,
    which is known wherever the text is what the model would have chosen.

    own: share of the loss that is with what the model would write, greedily; 0 learns the text alone.

    Deviations: heads learn the given text and the model's own choices for it, not whole chats of its own. Projections
    start from a least-squares guess of the states to come, not as copies of the model's. The paper searches the tree
    for one model once; here it is best-first under this model's own held-out hit rates.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"outputs", "decode"})

    steps: int = 200
    batch: int = 8
    own: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.own <= 1:
            raise SmeltError(f"own is a share of the loss between 0 and 1, not {self.own}")

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
        went = self.train(drill, learn, program, samples, "heads")
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


def _drafting(program: Program) -> decode.Heads | None:
    """The program's drafting by heads."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Heads)), None)
