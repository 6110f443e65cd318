"""Compiled programs, kept by content: the same model, recipe and calibration need no second compile.

An entry is an artefact in the cache folder, named by a hash of all that made it: the model's files, the recipe, the
tokenizer, the calibration data and smelt's own code. The oldest entries go when they take too much room together.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .codegen.build import cache
from .ir.capture import is_onnx
from .ir.errors import SmeltError
from .ir.program import Program
from .passes.report import Report
from .runtime import artefact

LAYERS = ("ir", "passes", "recipes")  # code that decides what a compile gives; kernels are made on loading


@dataclass(frozen=True)
class Kept:
    """What a compile gave."""

    program: Program
    facts: dict[str, Any]
    report: Report


def room() -> int:
    """Bytes that entries may take together: $SMELT_KEEP in gigabytes, 8 by default; 0 keeps and finds nothing."""
    asked = os.environ.get("SMELT_KEEP", "8")
    try:
        return int(float(asked) * 1e9)
    except ValueError as fault:
        raise SmeltError(f"SMELT_KEEP is '{asked}'; give gigabytes of disk, such as 8, or 0 to keep nothing") from fault


def key(recipe: str, sources: Sequence[Any], *texts: Any) -> str | None:
    """The name of a compile's entry, or None where `sources`, of model and tokenizer, are not folders to be hashed.

    `texts` are what it calibrates and trains on, or None.
    """
    if room() <= 0 or not all(isinstance(source, str | Path) and Path(source).is_dir() for source in sources):
        return None
    digest = hashlib.sha256()
    for piece in (code_digest(), recipe, *(piece for text in texts for piece in ("text", *_content(text)))):
        digest.update(piece.encode() + b"\0")
    for folder in dict.fromkeys(map(Path, sources)):
        inside = folder.rglob("*") if is_onnx(folder) else folder.iterdir()  # an .onnx may name data in subfolders
        for path in sorted(path for path in inside if path.is_file()):
            digest.update(str(path.relative_to(folder)).encode() + _file(path))
    return digest.hexdigest()[:32]


def find(name: str) -> Kept | None:
    """The entry of that name; a damaged one is removed, and none."""
    folder = _folder() / name
    if not folder.is_dir():
        return None
    try:
        program, manifest = artefact.load(folder)
        facts = {k: v for k, v in manifest.items() if k not in ("format", "weights", "draft", "files", "report")}
        report = Report.from_dict(manifest["report"])
    except (SmeltError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    os.utime(folder)  # who was used last, goes last
    return Kept(program, facts, report)


def keep(name: str, program: Program, facts: Mapping[str, Any], report: Report) -> None:
    """Write an entry, unless it would fill the room by itself or the disk is full; then drop the oldest."""
    if program.nbytes > room() or shutil.disk_usage(_existing(_folder())).free < 2 * program.nbytes:
        return
    artefact.save(_folder() / name, program, {}, {**facts, "report": report.to_dict()})
    trim(_folder())


def trim(folder: Path) -> None:
    """Drop the oldest of the folders in there that fill more than the room; the newest stays."""
    if not folder.is_dir():
        return
    told = {path: _told(path) for path in folder.iterdir() if path.is_dir()}
    there = sorted((each, path) for path, each in told.items() if each is not None)
    total = sum(size for (_, size), _ in there)
    for (_, size), path in there[:-1]:
        if total <= room():
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= size


def _told(folder: Path) -> tuple[float, int] | None:
    """When a folder last changed, and its bytes; None if another process has moved it away meanwhile."""
    try:
        return folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return None


def trainings() -> Path:
    """Where trainings leave their state if nobody names a folder."""
    return cache() / "trainings"


def _folder() -> Path:
    return cache() / "programs"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _content(given: Any) -> Iterator[str]:
    if given is None:
        return
    if isinstance(given, torch.Tensor):
        yield artefact.tensor_digest(given.detach().cpu())
    elif isinstance(given, str | Path):
        yield _file(Path(given)).hex() if Path(given).is_file() else str(given)
    elif isinstance(given, Mapping):
        yield from (f"{name} {digest}" for name, value in given.items() for digest in _content(value))
    else:
        yield from map(str, given)


def _file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@functools.cache
def code_digest() -> str:
    """A hash of the code that compiles, and of the libraries that capture."""
    digest = hashlib.sha256(torch.__version__.encode())
    for library in ("transformers", "onnx"):
        with suppress(PackageNotFoundError):
            digest.update(version(library).encode())
    here = Path(__file__).parent
    for layer in LAYERS:
        for path in sorted((here / layer).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
