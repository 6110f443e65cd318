"""smelt verify: a table of promises, the exit code 1 for a broken one, and a certificate of speculation."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import smelt
from smelt.cli import app
from smelt.runtime import trees
from smelt.runtime.artefact import MANIFEST, SEAL

from .. import tiny


def verify(*words: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, words)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text for two windows of the tiny model's context."""
    (tmp_path / "text.txt").write_text(tiny.tokens(600))
    return tmp_path / "text.txt"


def promising(expect: dict[str, object], place: Path) -> Path:
    """The artefact with other promises, sealed as if they had been compiled in."""
    out = Path(shutil.copytree(tiny.artefact(), place))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["recipe"]["expect"] = expect
    (out / MANIFEST).write_text(json.dumps(manifest))
    (out / SEAL).write_text(hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest())
    return out


def test_tells_each_promise(text: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny.artefact().iterdir()}
    result = verify(tiny.artefact(), "--source", tiny.model(), "--text", text, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    checks = {check["metric"]: check for check in told["checks"]}
    assert told["holds"] and set(checks) == {"replay_kl", "top1", "bits_per_value", "lossless", "kernels_kl"}
    assert checks["lossless"]["status"] == checks["kernels_kl"]["status"] == "holds"
    assert checks["bits_per_value"]["value"] == 32
    assert {path.name: path.stat().st_mtime_ns for path in tiny.artefact().iterdir()} == before


def test_a_broken_promise_ends_with_one(tmp_path: Path, text: Path) -> None:
    out = promising({"lossless": {"equals": 0}}, tmp_path / "out")
    result = verify(out, "--text", text)
    assert result.exit_code == 1
    assert "broken" in result.stdout and "lossless" in result.stdout


def test_bounds_for_another_model_bind_nobody(tmp_path: Path, text: Path) -> None:
    out = promising({"bits_per_value": {"at_most": 1}}, tmp_path / "out")
    result = verify(out, "--text", text)
    assert result.exit_code == 0, result.output
    assert "measured" in result.stdout and "promised on the reference model" in result.stdout


def test_what_cannot_be_measured_is_said(tmp_path: Path, text: Path) -> None:
    out = promising({"replay_kl": {"at_most": 1}, "sparkle": {"at_least": 1}}, tmp_path / "out")
    told = json.loads(verify(out, "--text", text, "--json").stdout)
    notes = {check["metric"]: check["note"] for check in told["checks"] if check["status"] == "not measured"}
    assert set(notes) == {"replay_kl", "sparkle"}
    assert "--source MODEL" in notes["replay_kl"]


def test_a_source_that_it_was_not_made_from_is_refused(text: Path, reference_path: Path, tmp_path: Path) -> None:
    assert verify(tiny.artefact(), "--source", tmp_path / "nowhere", "--text", text).exit_code == 2
    result = verify(tiny.artefact(), "--source", reference_path, "--text", text)
    assert result.exit_code == 2
    assert "its hidden is 256, the artefact's 64" in result.stderr


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(x): pass")
    result = verify(tiny.artefact(), "--text", tmp_path / "short.txt")
    assert result.exit_code == 2 and "too few" in result.stderr


def drafting(out: Path) -> Path:
    """An artefact that drafts."""
    steps = [{"cache.insert": {}}, {"decode.lookup": {}}]
    recipe = {"name": "drafted", "family": "deploy", "does": "Drafts.", "steps": steps}
    smelt.compile(str(tiny.model()), recipe).save(out)
    return out


def test_what_was_proved_of_speculation_is_certified(tmp_path: Path, text: Path) -> None:
    out = drafting(tmp_path / "out")
    assert verify(out, "--text", text, "--no-certificate").exit_code == 0
    assert "certificate" not in json.loads((out / MANIFEST).read_text())
    assert verify(out, "--text", text).exit_code == 0
    told = json.loads((out / MANIFEST).read_text())
    proved = told["certificate"]
    assert proved["law"] == "exact" and proved["equal"] == proved["asked"] == 3 * proved["prompts"] > 0
    assert (
        proved["program"] == told["files"]["program.txt"] and proved["weights"] == told["files"]["weights.safetensors"]
    )
    again = smelt.load(out)  # sealed anew, and every file as it was
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert f"certificate: {proved['equal']} of {proved['asked']} requests equal plain decoding" in shown
    again.save(tmp_path / "copy")
    assert "certificate" not in json.loads((tmp_path / "copy" / MANIFEST).read_text())


def test_drafts_that_change_a_token_are_certified_as_such(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = drafting(tmp_path / "out")
    monkeypatch.setattr(trees.Trees, "child", lambda self, row, node, token: (self.below(row, node).nodes or [None])[0])
    assert verify(out, "--text", text).exit_code == 1
    proved = json.loads((out / MANIFEST).read_text())["certificate"]
    assert proved["equal"] < proved["asked"] and "differs at token" in proved["difference"]
