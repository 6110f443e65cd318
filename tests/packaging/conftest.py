"""A copy of what gets packaged, for tests that build it or break it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("ir", "passes", "codegen", "runtime", "recipes")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout these tests stand in."""
    return ROOT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a fresh copy of the packaged part of the checkout, links kept as links."""

    def copy() -> Path:
        target = tmp_path_factory.mktemp("checkout")
        for name in FILES:
            shutil.copy2(ROOT / name, target / name)
        for name in ("src", *LAYERS):
            left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=left_out)
        return target

    return copy
