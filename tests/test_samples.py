"""Texts to calibrate on and to train on: each stands in for the other, and a training can be taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import smelt
from smelt import kept
from smelt.cli import app
from smelt.ir.errors import SmeltError
from smelt.passes.base import Checkpoints
from smelt.runtime.artefact import tensor_digest
from smelt.samples import samples

from . import tiny

FACTS = {"vocabulary": 100, "context": 16}
ONE, OTHER = torch.arange(32).view(2, 16), torch.ones(3, 16, dtype=torch.int64)
TRAINED = {
    "name": "trained",
    "family": "decode",
    "does": "Trains.",
    "steps": [
        {"cache.insert": {"dtype": "float16"}},
        {"decode.heads": {"heads": 2, "width": 2, "nodes": 3}},
        {"train.heads": {"steps": 2, "batch": 1, "length": 16, "checks": 1}},
    ],
}


def test_each_text_stands_in_for_the_other() -> None:
    both, calibrated, trained = (samples(*given, None, FACTS) for given in ((ONE, OTHER), (ONE, None), (None, OTHER)))
    assert both is not None and calibrated is not None and trained is not None
    assert torch.equal(both.tokens, ONE) and torch.equal(both.lessons, OTHER)
    assert torch.equal(calibrated.lessons, ONE)
    assert torch.equal(trained.tokens, OTHER) and torch.equal(trained.lessons, OTHER)
    assert samples(None, None, None, FACTS) is None


PIXELS = {"inputs": {"pixels": {"shape": ["B", 3, 4, 4], "dtype": "float32"}}}


def test_samples_of_what_reads_no_text() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    images = torch.randn(17, 4, 4, 4)
    recipe = {
        "name": "coded",
        "family": "weights",
        "does": "Rounds.",
        "steps": [{"weights.gptq": {"group": 8, "head": "keep"}}],
    }
    compiled = smelt.compile(model, recipe, example=(images,), calibration={"input": images})
    (step,) = compiled.report.steps
    assert step.notes["samples"] == 15 and step.done == ("1.weight",)  # an eighth is held out, and tells what was lost
    kept_images = compiled.run(input=images)["output0"]
    assert step.divergence is not None
    with torch.no_grad():
        meant, lost = model(images[15:]), kept_images[15:]
    assert step.divergence.max_error == pytest.approx(float((meant - lost).abs().max() / meant.abs().max()), rel=1e-3)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "every input must be a tensor of as many rows"),
        ({"pixels": [1]}, "every input must be a tensor"),
        ({"image": torch.ones(2, 3, 4, 4)}, "the model's input 'pixels' is missing; give pixels"),
        ({"pixels": torch.ones(2, 3, 4, 4), "x": torch.ones(2)}, "the model has no input 'x'; it reads pixels"),
        ({"pixels": torch.ones(2, 3, 4, 5)}, r"'pixels' must be \[B, 3, 4, 4\], not \[2, 3, 4, 5\]"),
        ({"pixels": torch.full((2, 3, 4, 4), torch.nan)}, "'pixels' has values that are not finite"),
    ],
)
def test_samples_that_do_not_fit(given: dict[str, torch.Tensor], why: str) -> None:
    with pytest.raises(SmeltError, match=f"^calibration: {why}"):
        samples(given, None, None, PIXELS)


def test_where_trainings_leave_their_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path))
    for keep, asked, wanted in (
        ("1", None, Checkpoints(tmp_path / "trainings", kept.code_digest())),
        ("0", None, None),
        ("0", tmp_path / "mine", Checkpoints(tmp_path / "mine")),
    ):
        monkeypatch.setenv("SMELT_KEEP", keep)
        given = samples(None, ONE, None, FACTS, asked)
        assert given is not None and given.checkpoints == wanted


def test_a_text_that_does_not_serve_is_called_by_its_role(tmp_path: Path) -> None:
    with pytest.raises(SmeltError, match=r"train: token 100 is not in the vocabulary of 100"):
        samples(None, ONE + 69, None, FACTS)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(SmeltError, match=r"short\.txt: \d tokens are too few to train on; give at least 512"):
        samples(None, tmp_path / "short.txt", tiny.model(), FACTS)


def test_the_command_line_trains_and_takes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_KEEP", "0")
    (tmp_path / "recipe.yaml").write_text(json.dumps(TRAINED))
    (tmp_path / "text.txt").write_text(tiny.tokens(1500))

    def compiled(*words: object) -> tuple[int, str]:
        arguments = ["compile", tiny.model(), *words, "-o", tmp_path / "out"]
        result = CliRunner().invoke(app, [str(word) for word in arguments])
        return result.exit_code, result.output

    place = ("--train", tmp_path / "text.txt", "--checkpoints", tmp_path / "states")
    for _ in range(2):
        code, told = compiled(tmp_path / "recipe.yaml", *place)
        assert code == 0, told
    lm = smelt.load(tmp_path / "out")
    (note,) = [record.report["notes"] for record in lm.program.history if record.name == "train.heads"]
    assert note["resumed_at"] == 2 and [point[0] for point in note["curve"]] == [0, 2]
    ids = lm.tokenizer.encode(tiny.tokens(1500))
    assert lm.facts["training"] == tensor_digest(torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256))
    code, told = compiled(tmp_path / "recipe.yaml", *place, "--set", "train.heads.rate=0.5")
    assert code == 2 and "heads.json: a checkpoint of other heads: options.rate is 0.001 there and 0.5 here" in told
    code, told = compiled("none", "--train", tmp_path / "text.txt")
    assert code == 2 and "trains nothing" in told
    code, told = compiled(tmp_path / "recipe.yaml", "--train", tmp_path / "nowhere.txt")
    assert code == 2 and "nowhere.txt: no such file; --train takes a text file" in told
