"""The command as a process: exit codes, what goes to which stream, interruption, and how much it imports."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import smelt

from .. import tiny

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
COMMANDS = ("compile", "run", "export", "recipes", "inspect", "verify", "tune", "bench")


def smelt_(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smelt", *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def test_says_its_version() -> None:
    assert smelt_("--version").stdout == f"smelt {smelt.__version__}\n"


def test_help_lists_every_command_and_each_has_an_example() -> None:
    listed = smelt_("--help").stdout
    assert re.findall(r"^  ([a-z]+)  ", listed.partition("Commands:")[2], re.MULTILINE) == list(COMMANDS)
    for command in COMMANDS:
        said = smelt_(command, "--help").stdout
        assert f"  smelt {command} " in said


def test_help_imports_no_torch() -> None:
    begin = "import sys; from smelt.cli import app; "
    look = begin + "app(['run', '-h'], standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stdout + done.stderr


def test_bad_input_is_one_line_on_stderr() -> None:
    done = smelt_("recipes", "nun", code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: no recipe 'nun' (did you mean 'none'?)") and done.stderr.count("\n") == 1


def test_compiles_and_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.smelt"
    smelt_("compile", tiny.model(), "none", "-o", out)
    done = smelt_("run", out, "def f(x):", "--max-new-tokens", 4)
    assert done.stdout == smelt.load(out).generate("def f(x):", max_new_tokens=4) + "\n"
    assert done.stderr == ""


def test_a_bug_keeps_its_traceback() -> None:
    broken = "import smelt.ir.capture as c\ndef boom(*_): raise ZeroDivisionError('boom')\nc.capture = boom\n"
    script = f"{broken}import sys\nfrom smelt.cli import main\nsys.argv = ['smelt', 'inspect', 'x']\nmain()"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: boom" in done.stderr


def test_an_interrupt_ends_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    slow = "import time, smelt.compiler as c\nc.capture = lambda *_: (print('begun', flush=True), time.sleep(60))\n"
    arguments = ["smelt", "compile", "x", "none", "-o", str(tmp_path / "out")]
    script = f"{slow}import sys\nfrom smelt.cli import main\nsys.argv = {arguments!r}\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode() == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close differently there")
def test_a_reader_that_leaves_ends_the_stream_quietly() -> None:
    command = f"{sys.executable} -m smelt run {tiny.artefact()} 'def f(x):' --max-new-tokens 200 | head -c 5"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert len(done.stdout.encode()) <= 5 and "Traceback" not in done.stderr
