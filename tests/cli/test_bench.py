"""smelt bench: rows for all who compete, with numbers that belong together."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from smelt.cli import app

from .. import tiny

SMALL = ["--prompt-tokens", "8", "--new-tokens", "6", "--prompts", "2", "--rounds", "2"]


def bench(*words: object) -> str:
    result = CliRunner().invoke(app, ["bench", str(tiny.artefact()), *SMALL, *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(tiny.tokens(600))
    return tmp_path / "text.txt"


def test_one_alone(text: Path) -> None:
    (row,) = json.loads(bench("--text", text, "--json"))["rows"]
    rate = row["decode_tokens_per_second"]
    assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert row["tokens_per_step"] == 1
    assert row["smelt_is_times_as_fast"] is None


def test_against_another_artefact_and_transformers(text: Path) -> None:
    for kind, what, name in (("smelt", tiny.artefact(), str(tiny.artefact())), ("hf", tiny.model(), "transformers")):
        ours, theirs = json.loads(bench("--text", text, "--against", kind, what, "--json"))["rows"]
        assert (ours["name"], theirs["name"]) == ("smelt", name)
        assert theirs["smelt_is_times_as_fast"]["median"] > 0
    assert theirs["weight_bytes"] * 2 == pytest.approx(ours["weight_bytes"], rel=0.01)  # bfloat16 against float32


def test_the_table_names_all(text: Path) -> None:
    said = bench("--text", text, "--against", "hf", tiny.model())
    assert "transformers" in said and "tokens a step" in said and "×" in said


@pytest.mark.parametrize("words", [("--against", "vllm", "x"), ("--new-tokens", "900"), ("--rounds", "0")])
def test_refuses_what_cannot_be_run(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, ["bench", str(tiny.artefact()), *words]).exit_code == 2
