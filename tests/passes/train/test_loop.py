"""The training loop: it learns, keeps the best weights, and goes on bit for bit where it was killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.passes import Samples
from smelt.passes.base import Checkpoints
from smelt.passes.train._checkpoint import Checkpoint
from smelt.passes.train._loop import Course, train

COURSE = Course(steps=12, batch=3, rate=0.05, checks=4)
SAMPLES = Samples(torch.zeros(1, 4, dtype=torch.int64))


class Line:
    """Learns the slope of noisy points; window i is point i."""

    def __init__(self) -> None:
        self.weights = {"slope": torch.zeros(3, requires_grad=True), "bias": torch.zeros(1, requires_grad=True)}
        self.points = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        points = self.points[windows] + 0.1 * torch.randn(len(windows), 3, generator=chance)
        return self._error(points, self.points[windows])

    @torch.no_grad()
    def check(self) -> float:
        return self._error(self.points, self.points).item()

    def _error(self, seen: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return (seen @ self.weights["slope"] + self.weights["bias"] - true.sum(1) - 1).square().mean()


def learnt(folder: Path, course: Course = COURSE, kill_at: int | None = None) -> tuple[Line, object]:
    line = Line()

    def progress(done: int, total: int, what: str) -> None:
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    samples = Samples(SAMPLES.tokens, progress, checkpoints=Checkpoints(folder))
    return line, train(line, 7, course, samples, "lines", {"model": "a", "options": {"rate": course.rate}})


def test_it_learns_and_tells_the_curve() -> None:
    line = Line()
    went = train(line, 7, Course(steps=200, batch=3, rate=0.05), SAMPLES, "lines", {})
    at, losses, held = zip(*went.curve, strict=True)
    assert at == (0, 25, 50, 75, 100, 125, 150, 175, 200) and losses[0] is None
    assert held[-1] < 0.05 * held[0] and went.kept == at[held.index(min(held))]
    assert line.check() == min(held)


def test_every_window_is_seen_once_in_a_round() -> None:
    seen = torch.cat([COURSE.windows(step, 7) for step in range(1, 15)]).view(-1, 7)
    assert all(sorted(row) == list(range(7)) for row in seen.tolist())
    assert len({tuple(row) for row in seen.tolist()}) > 1


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, went = learnt(tmp_path / "whole")
    code = "import sys; from pathlib import Path; import test_loop; test_loop.learnt(Path(sys.argv[1]), kill_at=8)"
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "killed"], env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    left = json.loads((tmp_path / "killed" / "lines.json").read_text())
    assert 1 <= left["step"] <= 8
    again, resumed = learnt(tmp_path / "killed")
    assert resumed.resumed == left["step"]
    assert resumed.curve == went.curve and resumed.kept == went.kept
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["lines-12.safetensors", "lines.json"]


def test_an_interrupted_training_loses_the_running_update_alone(tmp_path: Path, monkeypatch) -> None:
    whole, _ = learnt(tmp_path / "whole")
    monkeypatch.setattr(Checkpoint, "due", lambda self: False)
    line, calls = Line(), iter(range(100))

    def loss(*given: torch.Tensor) -> torch.Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return Line.loss(line, *given)

    line.loss = loss
    samples = Samples(SAMPLES.tokens, checkpoints=Checkpoints(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(line, 7, COURSE, samples, "lines", {"model": "a", "options": {"rate": COURSE.rate}})
    again, went = learnt(tmp_path / "cut")
    assert went.resumed == 5 and torch.equal(again.weights["slope"], whole.weights["slope"])


def test_what_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = learnt(tmp_path)
    second, went = learnt(tmp_path)
    assert went.resumed == COURSE.steps
    assert torch.equal(first.weights["slope"], second.weights["slope"])


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    learnt(tmp_path)
    with pytest.raises(SmeltError, match=r"lines\.json: a checkpoint of other lines: options\.rate is 0\.05 there and"):
        learnt(tmp_path, Course(steps=12, batch=3, rate=0.1))
    (tmp_path / "lines.json").write_text("{")
    with pytest.raises(SmeltError, match=r"lines\.json: the checkpoint cannot be read \(.*\); remove it to train"):
        learnt(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    learnt(tmp_path)
    (tmp_path / "lines-12.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(SmeltError, match="the checkpoint cannot be read"):
        learnt(tmp_path)


def test_a_damaged_one_in_the_cache_is_none(tmp_path: Path) -> None:
    samples = Samples(SAMPLES.tokens, checkpoints=Checkpoints(tmp_path, key=""))
    train(Line(), 7, COURSE, samples, "lines", {})
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(b"x" * 100)
    assert train(line := Line(), 7, COURSE, samples, "lines", {}).resumed == 0
    assert line.check() < Line().check()


def test_trainings_in_the_cache_do_not_meet(tmp_path: Path) -> None:
    for rate, code in ((0.1, "old"), (0.2, "old"), (0.1, "new")):
        samples = Samples(SAMPLES.tokens, checkpoints=Checkpoints(tmp_path, code))
        assert train(Line(), 7, Course(2, 1, rate), samples, "lines", {"rate": rate}).resumed == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SmeltError, match=r"file: the training cannot be saved"):
        learnt(tmp_path / "file")
    nobody_asked = Samples(SAMPLES.tokens, checkpoints=Checkpoints(tmp_path / "file", key=""))
    assert train(Line(), 7, COURSE, nobody_asked, "lines", {}).resumed == 0
