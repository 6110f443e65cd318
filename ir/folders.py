"""Folders that appear whole or not at all, and hashes of their files."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SmeltError


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A draft that becomes `folder` when the block ends, in place of what stood there; if it fails nothing changed.

    Raises SmeltError where the file system refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # a neighbour, because only within one file system a folder moves at once
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            draft = work / "new"
            draft.mkdir()
            yield draft
            for path in draft.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            _replace(folder, draft, work / "old")
        finally:
            if folder.exists() or not (work / "old").exists():  # else what was replaced could not be put back
                shutil.rmtree(work, ignore_errors=True)
    except OSError as fault:
        raise SmeltError(f"{folder}: cannot be written ({fault.strerror or fault})") from fault


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(folder: Path, draft: Path, old: Path) -> None:
    """Move the draft to its place; what stood there goes to `old`, and comes back if that fails."""
    if not folder.exists():
        draft.rename(folder)
        return
    folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
