"""Imports go downwards only: the import-linter contracts hold here, and break on each import that they forbid."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of root's pyproject.toml on root's own src."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    return subprocess.run([sys.executable, "-c", LINT], cwd=root, env=environment, capture_output=True, text=True)


def test_the_layers_hold(root: Path) -> None:
    result = lint(root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("ir/mutant.py", "from .. import passes", "smelt.ir.mutant -> smelt.passes"),
        ("ir/mutant.py", "def f():\n    from .. import codegen", "smelt.ir.mutant -> smelt.codegen"),
        ("ir/mutant.py", "from .. import __version__", "smelt.ir.mutant -> smelt"),
        ("ir/mutant.py", "from .. import __main__", "smelt.ir.mutant -> smelt.__main__"),
        ("passes/mutant.py", "from .. import codegen", "smelt.passes.mutant -> smelt.codegen"),
        ("passes/mutant.py", "from .. import runtime", "smelt.passes.mutant -> smelt.runtime"),
        ("passes/mutant.py", "from .. import recipes", "smelt.passes.mutant -> smelt.recipes"),
        ("codegen/mutant.py", "from .. import passes", "smelt.codegen.mutant -> smelt.passes"),
        ("codegen/mutant.py", "from .. import runtime", "smelt.codegen.mutant -> smelt.runtime"),
        ("runtime/mutant.py", "from .. import passes", "smelt.runtime.mutant -> smelt.passes"),
        ("runtime/mutant.py", "from .. import recipes", "smelt.runtime.mutant -> smelt.recipes"),
        ("recipes/mutant.py", "from .. import codegen", "smelt.recipes.mutant -> smelt.codegen"),
        ("recipes/mutant.py", "from .. import runtime", "smelt.recipes.mutant -> smelt.runtime"),
        ("src/smelt/unlisted.py", "", "smelt.unlisted"),
    ],
)
def test_a_wrong_import_is_named(file: str, line: str, said: str, checkout: Callable[[], Path]) -> None:
    copy = checkout()
    (copy / "src/smelt/__main__.py").touch()
    (copy / file).write_text(line + "\n")
    result = lint(copy)
    assert result.returncode == 1
    assert said in result.stdout
