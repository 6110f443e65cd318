"""The wheel, built through the sdist, holds all of smelt, and smelt works from it in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

LAYERS = ("ir", "passes", "codegen", "runtime", "recipes")

LOOK = """
import importlib, json, pathlib, pkgutil, smelt
names = [m.name for m in pkgutil.walk_packages(smelt.__path__, "smelt.") if not m.name.endswith("__main__")]
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps({"smelt": smelt.__file__, "version": smelt.__version__, **files}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout's reach (no PYTHONPATH); its output, or a failure that shows all of it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command[0]} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def packaged(root: Path) -> set[str]:
    """The names that a wheel of this checkout must hold."""
    package = root / "src" / "smelt"
    own = {path for path in package.rglob("*") if path.is_file() and not path.is_symlink()}
    layers = {path for layer in LAYERS for path in (root / layer).rglob("*") if path.is_file()}
    kept = {path for path in own | layers if "__pycache__" not in path.parts and path.suffix != ".md"}
    # an older rglob may walk the links too: a file is then found twice, under one name
    bases = {path: package if path.is_relative_to(package) else root for path in kept}
    return {f"smelt/{path.relative_to(base)}" for path, base in bases.items()}


@pytest.fixture(scope="module")
def dist(checkout: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of the checkout and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout())
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("smelt-*-py3-none-any.whl")
    return wheel


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose smelt is the wheel and whose other packages are those of this one."""
    target = tmp_path_factory.mktemp("clean")
    venv.create(target, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(target), "platbase": str(target)}))
    # a line of a .pth file extends the path, but .pth files found there do not count: an editable smelt stays unseen
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)))
    python = target / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=target)
    return target


def test_the_wheel_holds_every_file(wheel: Path, root: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("smelt/")}
    expected = packaged(root)
    assert expected - names == set()
    assert names - expected == set()
    assert "smelt/reference/model.safetensors" in names
    assert any(name.startswith("smelt/recipes/") and name.endswith(".yaml") for name in names)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_a_lost_link_is_noticed(checkout: Callable[[], Path], root: Path, tmp_path: Path) -> None:
    copy = checkout()
    (copy / "src/smelt/codegen").unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, cwd=copy)
    (broken,) = tmp_path.glob("*.whl")
    missing = packaged(root) - set(zipfile.ZipFile(broken).namelist())
    assert missing and all(name.startswith("smelt/codegen/") for name in missing)


def test_every_module_imports_from_the_wheel(clean: Path) -> None:
    files = json.loads(run(clean / "bin" / "python", "-I", "-c", LOOK, cwd=clean))
    version = files.pop("version")
    assert version == installed_version(clean)
    outside = {name: file for name, file in files.items() if file and not Path(file).is_relative_to(clean)}
    assert outside == {}
    assert {f"smelt.{layer}" for layer in LAYERS} <= set(files)


def test_the_reference_model_comes_along(clean: Path, reference_path: Path) -> None:
    (installed,) = clean.rglob("smelt/reference/model.safetensors")
    assert installed.read_bytes() == (reference_path / "model.safetensors").read_bytes()


def test_the_command_stands(clean: Path) -> None:
    assert "compile" in run(clean / "bin" / "smelt", "--help", cwd=clean)


def installed_version(clean: Path) -> str:
    """The version that the installed metadata names."""
    look = "from importlib.metadata import version; print(version('smelt'))"
    return run(clean / "bin" / "python", "-I", "-c", look, cwd=clean).strip()
