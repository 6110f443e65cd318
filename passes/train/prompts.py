"""Trains prompt tokens that guess the tokens after the next one (Parallel Prompt Decoding, Chen et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.ops import HEAD
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only
from ..decode._join import exchange
from ..decode.prompts import PROMPTS
from ._inserted import Inserted
from ._loop import Course, identity, train
from ._text import windows


@dataclass(frozen=True)
class Prompts(Pass):
    """The embeddings of decode.prompts learn the model's law of the tokens after the next; the tree fits their hits.

    The model is frozen; only prompts · K numbers learn. The loss is cross-entropy with the model's law on its eight
    likeliest tokens, where the text is what came so far.

    steps, batch, length, rate, seed: updates by AdamW, windows of text in each, tokens of a window, the largest rate,
        and the seed of the order of the windows and of the places.
    places: of a window, behind which prompt tokens are put in an update.
    decay: weight of a prompt token's loss relative to the one before it.
    holdout: share of the windows that are not trained on; they decide which weights are kept, and the tree.
    checks: times that held-out loss is measured.

    Deviations: places lie all over the given text, where the paper puts prompt tokens into the last answers of chats
    that the model has written itself.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})
    calibration: ClassVar[Literal["none", "text"]] = "text"

    steps: int = 300
    batch: int = 4
    length: int = 128
    rate: float = 1e-2
    places: int = 16
    decay: float = 0.8
    seed: int = 0
    holdout: float = 0.1
    checks: int = 8

    def __post_init__(self) -> None:
        self._course()
        if self.places < 1 or not 0 < self.holdout < 1:
            raise SmeltError(f"places counts from 1 and holdout is a share, not {self.places} and {self.holdout}")

    def requires(self, program: Program) -> Iterator[str]:
        """Untrained prompt tokens whose weight is Dense, and one vocabulary head."""
        yield from decoder_only(program)
        if PROMPTS not in program.weights or _drafting(program) is None:
            yield f"{program.name} must draft by prompt tokens, but does not: put decode.prompts in front"
            return
        since = program.changed_by(PROMPTS)
        if program.facts.get("prompts_trained"):
            yield f"the prompt tokens of {program.name} must be untrained, but are trained{since}: train them once"
        if not isinstance(encoding := program.weights[PROMPTS].encoding, Dense):
            yield f"{PROMPTS} must be Dense to be trained, but is {encoding}{since}: move train.prompts in front"
        if len(found := [node.name for node in program.calls(HEAD)]) != 1:
            yield f"{program.name} must have one vocabulary head, but has {len(found)}: {', '.join(found) or 'none'}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the embeddings in the type they had, and give their hit rates to the draft."""
        plan, draft = program.decode, _drafting(program)
        if samples is None or plan is None or draft is None:
            raise SmeltError("train.prompts needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, len(draft.rates) + 2, self.holdout, "train.prompts")
        learner = Inserted.of(program, learn, held, self.places, self.decay)
        went = train(learner, len(learn), self._course(), samples, "prompts", identity(program, self, samples))
        old, value = program.weights[PROMPTS], learner.weights[PROMPTS]
        program.weights[PROMPTS] = replace(old, parts=old.encoding.encode(value.detach()))
        value.data.copy_(program.weights[PROMPTS].dense())
        hits = learner.hits(len(draft.rates[0]))
        draft_of_hits = replace(draft, rates=tuple(tuple(round(rate, 4) for rate in ranks) for ranks in hits))
        program.decode = exchange(plan, draft, draft_of_hits)
        program.facts["prompts_trained"] = True
        program.touch("decode", PROMPTS)
        shape = decode.sparse(draft_of_hits.rates, draft.rows)
        notes = {
            "hits": [list(ranks) for ranks in draft_of_hits.rates],
            **went.to_dict(),
            "expected_tokens_per_step": round(shape.tokens, 3),
            "nodes": len(shape.tree) - 1,
            "prompt_rows": sum(shape.prompts),
        }
        return Outcome((PROMPTS,), notes=notes)

    def _course(self) -> Course:
        return Course(self.steps, self.batch, self.rate, seed=self.seed, checks=self.checks)


def _drafting(program: Program) -> decode.Prompts | None:
    """The program's drafting by prompt tokens."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Prompts)), None)
