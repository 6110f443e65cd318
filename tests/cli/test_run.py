"""smelt run: the text is that of the API, whatever the options, and only the text goes to stdout."""

import pytest
from typer.testing import CliRunner, Result

import smelt
from smelt.cli import app

from .. import tiny

PROMPT = "def f(x):\n"


def run(*words: object, text: str | None = None) -> Result:
    result = CliRunner().invoke(app, ["run", str(tiny.artefact()), *map(str, words)], input=text)
    assert result.exit_code == 0, result.output
    return result


def test_prints_what_generate_returns() -> None:
    lm = smelt.load(tiny.artefact())
    assert run(PROMPT, "--max-new-tokens", 12).stdout == lm.generate(PROMPT, max_new_tokens=12) + "\n"


def test_sampling_options_reach_the_sampler() -> None:
    lm = smelt.load(tiny.artefact())
    options = {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
    }
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    said = run(PROMPT, "--max-new-tokens", 12, "--seed", 5, *words).stdout
    assert said == lm.generate(PROMPT, max_new_tokens=12, seed=5, **options) + "\n"
    assert said != run(PROMPT, "--max-new-tokens", 12, "--seed", 6, *words).stdout


def test_every_single_option_matters() -> None:
    plain = run(PROMPT, "--max-new-tokens", 24, "--temperature", 1.5, "--seed", 1).stdout
    for option, value in (("--top-k", 1), ("--top-p", 0.01), ("--min-p", 0.9), ("--typical-p", 0.01)):
        assert run(PROMPT, "--max-new-tokens", 24, "--temperature", 1.5, "--seed", 1, option, value).stdout != plain


def test_an_answer_is_held_to_its_grammar_as_asked() -> None:
    pytest.importorskip("llguidance")
    words = PROMPT, "--max-new-tokens", 6, "--temperature", 1, "--regex", "[a-f]{3}"
    assert run(*words, "--constrain", "reject").stdout == run(*words).stdout != run(*words[:5]).stdout
    strange = CliRunner().invoke(app, ["run", str(tiny.artefact()), *map(str, words), "--constrain", "perhaps"])
    assert strange.exit_code == 2 and "constrain is mask, align" in strange.output


def test_stops_before_a_stop_string() -> None:
    whole = run(PROMPT, "--max-new-tokens", 12).stdout.rstrip("\n")
    mark = whole[4:6]
    assert run(PROMPT, "--max-new-tokens", 12, "--stop", mark).stdout == whole[: whole.index(mark)] + "\n"


def test_reads_the_prompt_from_stdin() -> None:
    assert run("-", "--max-new-tokens", 6, text=PROMPT).stdout == run(PROMPT, "--max-new-tokens", 6).stdout


def test_token_ids_in_and_out() -> None:
    lm = smelt.load(tiny.artefact())
    assert (
        run("5,6 7", "--ids", "--max-new-tokens", 6).stdout
        == ",".join(map(str, lm.generate([5, 6, 7], max_new_tokens=6))) + "\n"
    )


def test_stats_go_to_stderr() -> None:
    result = run(PROMPT, "--max-new-tokens", 6, "--stats")
    assert "5 tokens in" in result.stderr and "1.00 a step; ended by length" in result.stderr
    assert result.stdout == run(PROMPT, "--max-new-tokens", 6).stdout
