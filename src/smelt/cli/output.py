"""What is asked before the work, not after: where an artefact goes, and what else it needs to be read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model or artefact that OUT was stored as a change of.")
]


def check_output(folder: Path) -> None:
    """Raises SmeltError if `folder` cannot be written, or is something that must not be replaced."""
    from ..ir.errors import SmeltError
    from ..runtime.artefact import MANIFEST

    if folder.is_file() or (folder.is_dir() and not (folder / MANIFEST).is_file() and any(folder.iterdir())):
        raise SmeltError(f"{folder}: exists and is not a smelt artefact; choose another folder")
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place):
            pass
    except OSError as fault:
        raise SmeltError(f"{folder}: cannot be written, {place}: {fault.strerror}; choose another folder") from fault


def check_target(target: str) -> None:
    """Raises SmeltError for a target that there is not."""
    from ..ir.errors import SmeltError

    if target not in ("cpp", "triton", "torch"):
        raise SmeltError(
            f"--target {target}: choose cpp (generated kernels), triton (those for GPUs) or torch (the reference)"
        )
