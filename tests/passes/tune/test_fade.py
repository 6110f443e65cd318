"""tune.fade: what counts at each stage, gradients of what fades, patterns that are stored, and taking up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import NM, Affine, Dense
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.passes.base import Checkpoints, Outcome, Samples
from smelt.passes.tune._fading import Course, Faded, Schedule, Stage
from smelt.passes.tune.fade import Fade
from smelt.passes.weights.gptq import Gptq

from ..families import VOCABULARY, answer, captured, random_tokens

SHORT = {"steps": 24, "batch": 4, "length": 16, "rate": 3e-2, "text": 1.0, "checks": 3, "holdout": 0.25}
TASK = (torch.arange(24 * 16).view(24, 16) % 7 * 11) % VOCABULARY  # text of seven tokens in turn


def faded(samples: Samples | None = None, **options: object) -> tuple[Program, Outcome]:
    program = captured("llama")
    samples = samples or Samples(TASK, source=captured("llama"))
    return program, Fade(**{**SHORT, **options}).apply(program, samples)


def test_a_stage_counts_the_largest_in_full() -> None:
    value = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.5, 0.25, -0.1, 0.0]])
    assert Stage(2, 4, 0.25).factor(value).tolist() == [[1, 1, 0.25, 0.25, 1, 1, 0.25, 0.25]]
    assert Stage(1, 8).factor(value).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]


def test_the_course_of_each_decay() -> None:
    def course(decay: str, *updates: int) -> list[Stage]:
        return [Schedule(Stage(1, 8), decay, 0.5, 20).at(update) for update in updates]  # type: ignore[arg-type]

    assert course("none", 0, 19) == [Stage(1, 8)] * 2
    assert course("linear", 0, 4, 10) == [Stage(1, 8, 1.0), Stage(1, 8, 0.6), Stage(1, 8)]
    assert [round(stage.share, 6) for stage in course("exponential", 0, 5, 9, 10)] == [1, 0.1, 0.015849, 0]
    assert course("stepwise", 0, 4, 7, 10) == [Stage(7, 8), Stage(4, 8), Stage(2, 8), Stage(1, 8)]
    assert course("geometric", 0, 4, 7, 10) == [Stage(8, 64), Stage(4, 32), Stage(2, 16), Stage(1, 8)]


@pytest.mark.parametrize(
    ("straight", "shrink", "wanted"),
    [(True, 0.0, [2, 2, 2, 2]), (False, 0.0, [2, 2, 1, 1]), (True, 0.1, [2, 2, 2.1, 1.8])],
)
def test_gradients_of_what_fades(straight: bool, shrink: float, wanted: list[float]) -> None:
    leaf = torch.tensor([[3.0, -4.0, 1.0, -2.0]], requires_grad=True)
    course = Course(Schedule(Stage(2, 4), "linear", 0.5, 20), Stage(2, 4, 0.5))
    dense = Faded((1, 4), Dense("float32"), {"data": leaf}, course, straight, shrink).dense()
    assert dense.tolist() == [[3, -4, 0.5, -1]]
    (2 * dense).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.tensor([wanted], dtype=torch.float32))


@pytest.mark.parametrize("decay", ["linear", "stepwise"])
def test_what_stays_has_the_pattern_and_answers_better(decay: str) -> None:
    program, outcome = faded(decay=decay)
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"] - 0.5
    assert outcome.notes["kept_update"] == 24  # of earlier ones the checks see what they will be
    once, sparse = captured("llama"), {n for n, w in program.weights.items() if isinstance(w.encoding, NM)}
    assert sparse == {name for name in once.weights if "proj" in name} <= set(outcome.done)
    for name in sparse:
        assert program.weights[name].encoding == NM(2, 4)
        assert int(((program.weights[name].dense() != 0).unflatten(-1, (-1, 4)).sum(-1) != 2).sum()) == 0
    assert outcome.skipped["model.embed_tokens.weight"] == "a vocabulary matrix"
    Gptq(bits=4, group=32).apply(program, Samples(random_tokens(12, 16)))
    assert {program.weights[name].encoding for name in sparse} == {NM(2, 4, Affine(4, 16))}
    assert answer(program, random_tokens(1, 8)).isfinite().all()


def test_a_training_that_was_broken_off_goes_on_at_its_stage(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    source = captured("llama")
    with pytest.raises(KeyboardInterrupt):
        faded(Samples(TASK, stop, source=source, checkpoints=Checkpoints(tmp_path)))
    again, outcome = faded(Samples(TASK, source=source, checkpoints=Checkpoints(tmp_path)))
    whole, _ = faded(Samples(TASK, source=source))
    assert outcome.notes["resumed_at"] == 9
    assert {n: w.digest() for n, w in again.weights.items()} == {n: w.digest() for n, w in whole.weights.items()}


def test_what_cannot_fade_is_told() -> None:
    for options, why in [
        ({"pattern": "unstructured"}, "weights without a pattern"),
        ({"pattern": "2:5"}, "of is 2, 4, 8 or 16"),
        ({"final": 1.0}, "final is a share"),
        ({"shrink": 0.1, "gradient": "masked"}, "shrink is a weight"),
        ({"text": 2.0}, "text is a share"),
    ]:
        with pytest.raises(SmeltError, match=why):
            Fade(**options)
    with pytest.raises(SmeltError, match=r"tune\.fade needs texts"):
        Fade().apply(captured("llama"), None)
    assert any(
        "must be a multiple of 128" in why
        for why in Fade(pattern="2:16", decay="geometric").requires(captured("llama"))
    )
    program, _ = faded(steps=1)
    assert any("must be Dense" in why for why in Fade().requires(program))
