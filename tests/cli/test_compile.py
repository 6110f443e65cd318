"""smelt compile: what it writes, what it prints, and that looking at a step changes nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import smelt
from smelt.cli import app
from smelt.ir.text import parse_program

from .. import tiny

TWO_STEPS = "name: two\nfamily: cache\ndoes: x\nsteps:\n- cache.insert: {dtype: float32}\n- weights.quantize\n"


def smelt_(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two steps."""
    (tmp_path / "two.yaml").write_text(TWO_STEPS)
    return tmp_path / "two.yaml"


def test_writes_an_artefact_and_prints_the_report(tmp_path: Path) -> None:
    result = smelt_("compile", tiny.model(), "none", "-o", tmp_path / "deep" / "out")
    assert result.exit_code == 0, result.output
    assert "cache.insert" in result.stdout and "done" in result.stdout
    assert smelt.load(tmp_path / "deep" / "out").program.cache is not None


def test_replaces_an_artefact(tmp_path: Path, recipe: Path) -> None:
    for _ in range(2):
        assert smelt_("compile", tiny.model(), "none", "-o", tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "two.yaml"]


def test_json_is_all_that_stdout_holds(tmp_path: Path, recipe: Path) -> None:
    arguments = ("--json", "--print-after", "cache.insert")
    told = json.loads(smelt_("compile", tiny.model(), recipe, "-o", tmp_path / "out", *arguments).stdout)
    assert [step["name"] for step in told["report"]["steps"]] == ["cache.insert", "weights.quantize"]
    assert told["recipe"]["name"] == "two"
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert list(told["graphs"]) == ["cache.insert"]
    assert "smelt.cached_attention" in told["graphs"]["cache.insert"]


def test_a_printed_graph_parses_back(tmp_path: Path) -> None:
    result = smelt_("compile", tiny.model(), "none", "-o", tmp_path / "out", "--print-after", "cache.insert")
    text = result.stdout.partition("# behind cache.insert\n")[2]
    graph = text[: text.index("\n}\n", text.index("\ngraph {")) + 3]
    weights = smelt.load(tmp_path / "out").program.weights
    assert parse_program(graph, weights).cache is not None


def test_set_reaches_the_pass(tmp_path: Path, recipe: Path) -> None:
    arguments = ("--set", "cache.insert.dtype=float16", "--stop-after", "cache.insert")
    assert smelt_("compile", tiny.model(), recipe, "-o", tmp_path / "out", *arguments).exit_code == 0
    program = smelt.load(tmp_path / "out").program
    assert program.cache is not None and {site.dense for site in program.cache.sites} == {"float16"}
    assert [record.name for record in program.history] == ["cache.insert"]


@pytest.mark.parametrize("option", ["--stop-after", "--print-after"])
def test_an_unknown_step_is_refused_before_the_model_is_read(option: str, tmp_path: Path) -> None:
    result = smelt_("compile", tmp_path / "unread", "none", "-o", tmp_path / "out", option, "cache.insrt")
    assert result.exit_code == 2
    assert "did you mean 'cache.insert'" in result.stderr


def test_the_reference_target_runs_without_kernels(tmp_path: Path) -> None:
    result = smelt_("compile", tiny.model(), "none", "-o", tmp_path / "out", "--target", "torch", "--no-fallback")
    assert result.exit_code == 0, result.output
    assert smelt_("compile", tiny.model(), "none", "-o", tmp_path / "x", "--target", "cuda").exit_code == 2


def test_a_failed_step_leaves_the_graph_before_it(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(TWO_STEPS.replace("weights.quantize", "cache.insert"))
    out = tmp_path / "out"
    result = smelt_("compile", tiny.model(), tmp_path / "twice.yaml", "-o", out, "--keep-failed")
    assert result.exit_code == 2
    assert "out.failed.txt" in result.stderr
    assert "smelt.cached_attention" in (tmp_path / "out.failed.txt").read_text()
    assert not out.exists()


def test_bisect_names_the_step_and_its_sites(recipe: Path) -> None:
    result = smelt_("compile", tiny.model(), recipe, "--bisect", "--max-kl", "1e-7", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["guilty"]["name"] == "weights.quantize"
    assert found["sites"] and all(site["kl"] >= 0 for site in found["sites"])
    plain = smelt_("compile", tiny.model(), recipe, "--bisect", "--max-kl", "1e-7").stdout
    assert "first beyond 1e-07" in plain and found["sites"][0]["site"] in plain


def test_debug_levels_add_up(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {1: "weights.quantize: done", 2: "rewrote", 3: "attention over segments", 4: "static void", 5: "graph {"}
    for level in (0, 2, 3, 5):
        monkeypatch.setenv("SMELT_DEBUG", str(level))
        result = smelt_("compile", tiny.model(), recipe, "-o", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert [mark for mark in marks.values() if mark in result.stderr] == [m for n, m in marks.items() if n <= level]
