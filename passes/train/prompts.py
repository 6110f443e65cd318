"""Trains prompt tokens that guess the tokens after the next one (Parallel Prompt Decoding, Chen et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import one_head
from ..base import Outcome, Samples, decoder_only
from ..decode._join import exchange
from ..decode.prompts import PROMPTS
from ._inserted import Inserted
from ._loop import store
from ._text import windows
from ._training import DraftTraining


@dataclass(frozen=True)
class Prompts(DraftTraining):
    """The embeddings of decode.prompts learn the model's law of the tokens after the next; the tree fits their hits.

    The model is frozen; only prompts · K numbers learn. The loss is cross-entropy with the model's law on its eight
    likeliest tokens, where the text is what came so far.

    places: of a window, behind which prompt tokens are put in an update.

    Deviations: places lie all over the given text, where the paper puts prompt tokens into the last answers of chats
    that the model has written itself.
    """

    rate: float = 1e-2
    places: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.places < 1:
            raise SmeltError(f"places counts from 1, not {self.places}")

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
        yield from one_head(program)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the embeddings in the type they had, and give their hit rates to the draft."""
        plan, draft = program.decode, _drafting(program)
        if samples is None or plan is None or draft is None:
            raise SmeltError("train.prompts needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, len(draft.rates) + 2, self.holdout, "train.prompts")
        learner = Inserted.of(program, learn, held, self.places, self.decay)
        went = self.train(learner, learn, program, samples, "prompts")
        store(learner, program.weights)
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


def _drafting(program: Program) -> decode.Prompts | None:
    """The program's drafting by prompt tokens."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Prompts)), None)
