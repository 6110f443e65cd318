"""Compiled programs are found again by content, and only then."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import smelt
from smelt import kept
from smelt.compiler import capture
from smelt.ir.errors import SmeltError
from smelt.ir.text import same_program

from . import tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of its own, and a cache of its own."""
    monkeypatch.setenv("SMELT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SMELT_KEEP", "1")
    return tiny.write_model(tmp_path / "model")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were captured, which a compile that is found again does not do."""
    seen: list[Path] = []

    def counted(model: Path, example: object) -> object:
        seen.append(model)
        return capture(model, example)

    monkeypatch.setattr("smelt.compiler.capture", counted)
    return seen


def test_the_second_compile_reads_the_first(model: Path, captures: list[Path]) -> None:
    first, again = (smelt.compile(model, "finequant", target="torch") for _ in range(2))
    assert len(captures) == 1
    assert same_program(first.program, again.program) is None
    assert again.report is not None and first.report is not None
    assert again.report.to_dict() == first.report.to_dict() and again.facts == first.facts
    prompt = list(range(1, 20))
    assert again.generate(prompt, max_new_tokens=8) == first.generate(prompt, max_new_tokens=8)


def test_another_model_recipe_or_calibration_is_compiled(model: Path, captures: list[Path]) -> None:
    smelt.compile(model, "none")
    smelt.compile(model, "finequant")
    assert len(captures) == 2
    smelt.compile(model, "finequant", overrides=["weights.quantize.bits=8"])
    assert len(captures) == 3
    smelt.compile(model, "none", calibration=torch.ones(3, 200, dtype=torch.int64))
    assert len(captures) == 4
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    smelt.compile(model, "none")
    assert len(captures) == 5


def test_a_part_of_a_recipe_and_a_watched_compile_run_their_steps(model: Path, captures: list[Path]) -> None:
    whole = smelt.compile(model, "finequant")
    part = smelt.compile(model, "finequant", stop_after="weights.quantize")
    assert len(captures) == 2 and part.program.cache is None and whole.program.cache is not None
    events: list[object] = []
    smelt.compile(model, "finequant", listen=events.append, anew=True)
    assert len(captures) == 3 and events
    assert smelt.compile(model, "finequant").program.cache is not None and len(captures) == 3  # a part is not kept


def test_a_damaged_entry_is_compiled_anew(model: Path, captures: list[Path], tmp_path: Path) -> None:
    smelt.compile(model, "none")
    (entry,) = (tmp_path / "cache" / "programs").iterdir()
    (entry / "program.txt").write_text("smelt 1")
    smelt.compile(model, "none")
    assert len(captures) == 2
    smelt.compile(model, "none")
    assert len(captures) == 2


def test_the_oldest_go_when_the_room_is_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smelt.compile(model, "none")
    programs = tmp_path / "cache" / "programs"
    (first,) = programs.iterdir()
    size = sum(file.stat().st_size for file in first.iterdir())
    time.sleep(0.01)
    monkeypatch.setenv("SMELT_KEEP", str(1.2 * size / 1e9))
    smelt.compile(model, "finequant")
    (left,) = programs.iterdir()
    assert left != first


def test_what_another_process_takes_away_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_KEEP", "1e-9")  # one byte
    for name in ("first", "moved", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"two")
        os.utime(tmp_path / name, (len(list(tmp_path.iterdir())),) * 2)
    listed = Path.iterdir

    def moving(path: Path) -> Iterator[Path]:
        if path.name == "moved":
            shutil.rmtree(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", moving)
    kept.trim(tmp_path)
    assert [path.name for path in listed(tmp_path)] == ["last"]


def test_nothing_is_kept_where_it_is_not_wanted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_KEEP", "0")
    smelt.compile(model, "none")
    assert not (tmp_path / "cache" / "programs").exists()
    monkeypatch.setenv("SMELT_KEEP", "much")
    with pytest.raises(SmeltError, match="SMELT_KEEP is 'much'; give gigabytes"):
        kept.room()
