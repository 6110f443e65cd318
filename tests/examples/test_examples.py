"""Every example runs and prints what it made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# what a quick run of each takes, and a word that its output must hold
RUNS = {
    "quickstart.py": ([], "saved to"),
    "write_a_recipe.py": ([], "cache.encode"),
    "look_at_a_graph.py": ([], "parsed back equal"),
    "compare_recipes.py": ([], "token-recycling"),
    "write_a_pass.py": ([], "aten.mul.Tensor"),
    "train_heads.py": (["--steps", "4"], "tokens a step"),
    "train_reference.py": (
        ["{tmp}/model", "--steps", "2", "--megabytes", "1.5", "--layers", "1", "--hidden", "128", "--vocabulary", "512",
         "--length", "64", "--batch", "2"],
        "saved to",
    ),
    "demo.py": ([], "def "),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_runs_and_prints(name: str, tmp_path: Path) -> None:
    arguments, word = RUNS[name]
    command = [sys.executable, str(ROOT / "examples" / name), *(a.format(tmp=tmp_path) for a in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert word in done.stdout


def test_every_example_is_listed() -> None:
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == set(RUNS)
