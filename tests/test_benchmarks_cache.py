"""The cache benchmark: a task has one answer, a mark tells a cache that forgets, a replay is the cache's own."""

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.errors import SmeltError
from smelt.runtime.text import Tokenizer

from . import tiny

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
INT8 = [
    {"cache.insert": {"dtype": "float16"}},
    {"cache.encode": {"keys": {"affine": {"bits": 8, "axis": "channel", "group": 32, "zero": True}}, "page": 32}},
]


@pytest.fixture
def piece(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Modules of the benchmark by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: importlib.import_module(f"cache.{name}")


@pytest.fixture
def words(piece: Callable[[str], Any]) -> Any:
    return piece("tasks").Words.of(Tokenizer(smelt.reference_model()), tiny.tokens(2000))


def test_every_question_has_one_answer(piece: Callable[[str], Any], words: Any) -> None:
    for case in piece("tasks").cases(words, 3, 200, 12, 5, seed=0):
        assert len(case.context) == 200 and len(case.questions) == 5
        for question in case.questions:
            found = [i for i in range(200) if case.context[i : i + 2] == question.asked]
            assert len(found) == 1
            assert case.context[found[0] + 2 : found[0] + 4] == question.answer
        answers = [token for question in case.questions for token in question.answer]
        assert all(case.context.count(token) == 1 for token in answers if token not in words.filler)


def test_cases_are_those_of_their_seed(piece: Callable[[str], Any], words: Any) -> None:
    cases = piece("tasks").cases
    assert cases(words, 2, 64, 3, 1, seed=1) == cases(words, 2, 64, 3, 1, seed=1)
    assert cases(words, 2, 64, 3, 1, seed=1) != cases(words, 2, 64, 3, 1, seed=2)
    with pytest.raises(ValueError, match="do not hold"):
        cases(words, 1, 16, 4, 1, seed=0)


def test_lessons_teach_answers(piece: Callable[[str], Any], words: Any) -> None:
    tokens, places = piece("tasks").lesson(words, 256, random.Random(0))
    assert len(tokens) == 256 and places
    for first in places[::2]:  # the key; its line stands before, with the same two values
        key = tokens[first]
        before = tokens.index(key)
        assert before < first and tokens[before + 1 : before + 3] == tokens[first + 1 : first + 3]


class Oracle:
    """A session that answers from the lines of its prompt, but for those that it forgot."""

    forgets: Callable[[int], bool] = staticmethod(lambda place: False)

    def __init__(self, plan: Any, rows: int, capacity: int) -> None:
        self.committed: list[Any] = []
        self.cache = SimpleNamespace(commit=self.committed.append)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = prompts

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = torch.zeros(*tokens.shape, 4096)
        for row, prompt in enumerate(self.prompts):
            assert positions[row].tolist() == list(range(len(prompt), len(prompt) + tokens.shape[1]))
            lines = [i for i in range(len(prompt) - 3) if list(prompt[i : i + 2]) == tokens[row, :2].tolist()]
            if lines and not self.forgets(lines[0]):
                for i in (1, 2):
                    logits[row, i, prompt[lines[0] + i + 1]] = 1.0
        return {"logits": logits}


def test_recall_counts_what_a_cache_still_knows(
    piece: Callable[[str], Any], words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recall = piece("recall")
    exam = recall.Exam("many", tuple(piece("tasks").cases(words, 4, 300, 20, 8, seed=3)))
    monkeypatch.setattr(recall, "Session", Oracle)
    assert recall.recall(None, exam, known=False, rows=3) == 1.0
    assert recall.recall(None, exam, known=True, rows=3) == 1.0
    monkeypatch.setattr(Oracle, "forgets", staticmethod(lambda place: place < 150))
    assert 0.2 < recall.recall(None, exam, known=False, rows=3) < 0.8


def test_known_questions_end_their_prompts(piece: Callable[[str], Any], words: Any) -> None:
    exam = piece("recall").Exam("many", tuple(piece("tasks").cases(words, 2, 100, 4, 3, seed=0)))
    assert [len(prompt) for prompt, _ in exam.asked(known=False)] == [100, 100]
    known = exam.asked(known=True)
    assert len(known) == 2 * exam.known_questions
    assert all(tuple(prompt[100:]) == question.asked for prompt, (question,) in known)


def test_the_replay_does_not_depend_on_its_steps(piece: Callable[[str], Any]) -> None:
    replay = piece("replay")
    recipe = {"name": "x", "family": "cache", "does": "X.", "steps": INT8}
    compiled = smelt.compile(tiny.model(), recipe, target="torch")
    dense = smelt.compile(tiny.model(), "none", target="torch")
    text = replay.windows(torch.randint(4096, (600,), generator=torch.Generator().manual_seed(0)).tolist(), 200, 2)
    assert text.tokens.shape == (2, 200) and text.prefix == 100
    plain, whole = replay.replay(dense.plan, text, rows=2), replay.replay(compiled.plan, text, rows=2)
    single = replay.replay(compiled.plan, text, rows=1, chunk=1)
    assert (whole - single).abs().max() < 1e-4 * whole.abs().max()
    found = replay.fidelity(plain, whole, text.targets)
    assert 1e-9 < found.kl < 0.1 and found.ratio == pytest.approx(1, abs=0.1)
    assert replay.fidelity(plain, plain.roll(1, 1), text.targets).kl > 10 * found.kl
    weight = replay.weigh(compiled, text.tokens[0].tolist())
    assert weight.measured == pytest.approx(weight.formula) and 8 < weight.measured < 16


def test_peers_are_asked_the_same(piece: Callable[[str], Any], words: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    replay, recall, peers, run_peers = map(piece, ("replay", "recall", "peers", "run_peers"))
    text = replay.windows(torch.randint(4096, (300,), generator=torch.Generator().manual_seed(0)).tolist(), 64, 2)
    exam = recall.Exam("many", tuple(piece("tasks").cases(words, 1, 64, 2, 2, seed=0)))
    absent = [{"name": "absent", "press": "NoSuchPress", "options": {}}]
    exams = {"many known": (exam, True), "many unknown": (exam, False)}
    job = peers.job(tiny.model(), exams, {64: text}, exam.cases[0].context, 2, 1, absent)
    with torch.no_grad():
        dense, missing = run_peers.contest(json.loads(json.dumps(job)))
    assert "error" in missing
    assert dense["bits"] == 16 and dense["many known"] == 0  # its weights are random
    compiled = smelt.compile(tiny.model(), "none", target="torch")
    ours = replay.replay(compiled.plan, text, rows=2)
    assert dense["replay"]["64"]["perplexity"] == pytest.approx(
        replay.fidelity(ours, ours, text.targets).perplexity, rel=1e-3
    )
    with pytest.raises(peers.Missing, match="--install"):
        list(peers.ask(tmp_path / "none", tmp_path, job))


def test_bars_are_judged(piece: Callable[[str], Any]) -> None:
    report = piece("report")

    def row(ratio: float, many: float, bits: float, resident: float) -> dict[str, Any]:
        return {
            "reference": {"ratio": ratio},
            "recall": {"many unknown": many},
            "bits": {"measured": bits},
            "resident": {"measured": resident, "formula": 200e6 if bits > 8 else 50e6},
        }

    rows = {
        "none": row(1, 0.99, 32, 210e6),
        "kivi": row(1.004, 0.98, 5, 55e6),
        "kvquant": row(1.02, 0.5, 4, 150e6),
        "kvpress Knorm 50%": {"recall": {"many unknown": 0.7}, "bits": {"measured": 8.0}},
        "broken": {"error": "cannot be compiled"},
    }
    said = list(report.lines(rows))
    assert [line[:4] for line in said] == ["ok  ", "MISS", "ok  ", "ok  ", "MISS"]
    assert "kivi 98.0%, kvpress Knorm 50% 70.0%" in said[2]
    fewer = list(report.lines({**rows, "kivi": row(1.004, 0.6, 5, 55e6)}))
    assert [line[:4] for line in fewer] == ["ok  ", "MISS", "MISS", "ok  ", "MISS"]
    assert report.table(rows, "x").row_count == len(rows)
    points = {
        "kivi": (6.4, 1e-4),
        "kivi:3": (4.3, 5e-3),
        "kivi:2": (3.4, 9e-3),
        "gear": (5, 4e-3),
        "gear-l": (4.2, 1e-2),
    }
    rows = {name: {"bits": {"measured": bits}, "reference": {"kl": kl}} for name, (bits, kl) in points.items()}
    said = list(report.lines(rows))
    assert ["kivi:3" in said[0], "kivi:2" in said[1]] == [True, True] and [s[:4] for s in said] == ["ok  ", "MISS"]


def test_recipes_come_by_name(piece: Callable[[str], Any]) -> None:
    recipes = piece("recipes")
    assert recipes.default()[0] == "none" and "quantized-pruning" in recipes.default()
    named = recipes.resolve(["int4:cache.encode.page=32", "int2"])
    assert list(named) == ["none", "int4:cache.encode.page=32", "int2"]
    assert named["int4:cache.encode.page=32"].steps[1].options["page"] == 32
    with pytest.raises(SmeltError, match="int5"):
        recipes.resolve(["int5"])


def test_a_model_is_made_once(piece: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = piece("recall_model")
    course = made.Course(stages=((64, 2),), tokens=256, context=1024)
    folder = made.recall_model(tmp_path / "recall", course)
    stamp = (folder / made.FACTS).stat().st_mtime_ns
    assert made.recall_model(folder, course) == folder and (folder / made.FACTS).stat().st_mtime_ns == stamp
    compiled = smelt.compile(folder, "none", target="torch")
    assert compiled.context == 1024
    made.recall_model(folder, made.Course(stages=((64, 1),), tokens=256, context=1024))
    assert (folder / made.FACTS).stat().st_mtime_ns != stamp


def test_it_runs(tmp_path: Path) -> None:
    words = ("--quick", "--target", "torch", "--peers", "", "--results", tmp_path, "--recipes", "int4")
    command = [sys.executable, BENCHMARKS / "cache.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("cache-*.json")
    rows = json.loads(written.read_text())["rows"]
    assert list(rows) == ["none", "int4"] and rows["int4"]["bits"]["measured"] < rows["none"]["bits"]["measured"]
    assert {"reference", "replay", "recall", "rate", "resident"} <= rows["int4"].keys()
    refused = subprocess.run(
        list(map(str, [*command[:-1], "int5"])), env=environment, capture_output=True, text=True, timeout=600
    )
    assert refused.returncode == 2 and "int5" in refused.stderr
