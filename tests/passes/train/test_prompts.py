"""train.prompts: rows beside the text are what they would be behind it, they learn, and the model stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.base import Checkpoints
from smelt.passes.decode.prompts import PROMPTS, Prompts
from smelt.passes.train._inserted import Beside, Inserted
from smelt.passes.train.prompts import Prompts as Train

from ...ir.programs import cached as over_cache
from ...ir.programs import captured

QUICK = Train(steps=12, batch=4, length=32, rate=0.05, places=8, checks=2)


@pytest.fixture
def prompted(cached: Program) -> Program:
    Prompts(prompts=2, width=4, rows=8, dtype="float32").apply(cached, None)
    cached.touched.clear()
    return cached


def worst(program: Program, ids: torch.Tensor, cap: float | None) -> float:
    """The largest difference of logits at prompt tokens beside a text from those behind the text up to their place."""
    drawn = torch.randn(program.weights[PROMPTS].shape, generator=torch.Generator().manual_seed(1))
    program.weights[PROMPTS] = Weight.of(drawn * 0.1)
    learner, places = Inserted.of(program, ids, ids, 4, 0.8), torch.tensor([[0, 3, 12, 12], [20, 1, 5, 9]])
    found = learner.head.logits(learner.states(learner.learn, torch.tensor([1, 0]), places)).detach()
    found = found if cap is None else cap * (found / cap).tanh()
    differences = []
    for n, row in enumerate((1, 0)):
        for p, place in enumerate(places[n].tolist()):
            whole = torch.cat([ids[row, : place + 1], torch.tensor([97, 98])])[None]
            out = interpret(program, {"tokens": whole, "positions": torch.arange(place + 3)[None]})["logits"][0, -2:]
            differences.append(float((found[n, p] - out).abs().max()))
    return max(differences)


@pytest.mark.parametrize(("family", "cap"), [("llama", None), ("gemma2", 30.0)])
def test_a_row_beside_the_text_is_the_one_behind_it(
    family: str, cap: float | None, text: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma has windows of 8 tokens, and soft caps, which the head's logits go through."""
    program = over_cache(captured(family), dense="float32")
    Prompts(prompts=2, width=4).apply(program, None)
    ids = text.tokens[:2, :24]
    assert worst(program, ids, cap) < 1e-4
    made = Beside.__init__
    monkeypatch.setattr(Beside, "__init__", lambda self, keys, values, back: made(self, keys, values, back + 1))
    assert worst(program, ids, cap) > 1e-2


def test_it_learns_and_touches_the_prompt_tokens_alone(prompted: Program, text: Samples) -> None:
    before = prompted.fork()
    outcome = QUICK.apply(prompted, text)
    verify(prompted)
    first, last = outcome.notes["curve"][0][2], min(point[2] for point in outcome.notes["curve"])
    assert last < 0.95 * first and outcome.notes["kept_update"] > 0
    assert prompted.touched == {"decode", PROMPTS}
    assert [name for name in before.weights if prompted.weights[name] is not before.weights[name]] == [PROMPTS]
    assert prompted.decode is not None and before.decode is not None
    assert [list(ranks) for ranks in prompted.decode.draft.rates] == outcome.notes["hits"]  # type: ignore[attr-defined]
    assert outcome.notes["hits"][0][0] > 0.1 and outcome.notes["expected_tokens_per_step"] > 1.1
    assert list(Train().requires(prompted)) == [
        "the prompt tokens of llama must be untrained, but are trained: train them once"
    ]


def test_a_training_is_taken_up_again(prompted: Program, text: Samples, tmp_path: Path) -> None:
    again, fresh = prompted.fork(), prompted.fork()
    QUICK.apply(prompted, text)

    def stop(done: int, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    kept = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        QUICK.apply(again.fork(), replace(text, progress=stop, checkpoints=kept))
    outcome = QUICK.apply(again, replace(text, checkpoints=kept))
    assert outcome.notes["resumed_at"] > 0
    assert torch.equal(again.weights[PROMPTS].dense(), prompted.weights[PROMPTS].dense())
    with pytest.raises(SmeltError, match=r"prompts\.json: a checkpoint of other prompts: options\.rate is 0\.05 there"):
        replace(QUICK, rate=0.1).apply(fresh, replace(text, checkpoints=kept))


def test_what_cannot_be_trained_is_said(cached: Program, text: Samples) -> None:
    assert list(Train().requires(cached)) == [
        "llama must draft by prompt tokens, but does not: put decode.prompts in front"
    ]
    Prompts(prompts=2, width=4).apply(cached, None)
    with pytest.raises(SmeltError, match=r"train\.prompts: windows of 3 tokens are too short"):
        QUICK.apply(cached, Samples(text.tokens[:, :3]))
    cached.weights[PROMPTS] = cached.weights[PROMPTS].encoded(Affine(4, 32))
    assert "must be Dense to be trained" in next(Train().requires(cached))
