"""The artefact: a folder with a program as text, its weights as safetensors, a tokenizer and a manifest of hashes.

Nothing in it is executed or unpickled: the program is parsed against a fixed table of ops, weights are mapped. Every byte
is under a hash. A folder appears whole or not at all: it is written beside its place and moved there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..ir.capture.checkpoint import read_header
from ..ir.encoding import parse as parse_encoding
from ..ir.errors import SmeltError
from ..ir.program import Program
from ..ir.text import parse_program, print_program
from ..ir.weight import Mapped, Weight

FORMAT = 1
MANIFEST, SEAL, PROGRAM, WEIGHTS = "manifest.json", "manifest.sha256", "program.txt", "weights.safetensors"


def save(folder: Path, program: Program, assets: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Write `folder`; `assets` are further files (the tokenizer's), `facts` go into the manifest as they are.

    An existing artefact is replaced; anything else that stands there is left alone and refused.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SmeltError(f"{folder}: exists and is not a smelt artefact; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(draft, program, assets, facts)
        _replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write(draft: Path, program: Program, assets: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    save_file({f"{n}/{p}": t.contiguous() for n, w in program.weights.items() for p, t in w.parts.items()}, draft / WEIGHTS)
    (draft / PROGRAM).write_text(print_program(program))
    for name, content in assets.items():
        (draft / name).write_bytes(content)
    weights = {n: {"shape": list(w.shape), "encoding": w.encoding.spec(), "parts": sorted(w.parts)} for n, w in program.weights.items()}
    manifest = {
        "format": FORMAT,
        **facts,
        "weights": weights,
        "files": {p.name: _sha256(p) for p in sorted(draft.iterdir())},
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    (draft / SEAL).write_text(_sha256(draft / MANIFEST) + "\n")
    for path in draft.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    draft.chmod(0o755)


def _replace(draft: Path, folder: Path) -> None:
    if not folder.exists():
        draft.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent)) / "artefact"
    folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old.parent, ignore_errors=True)


def load(folder: Path) -> tuple[Program, dict[str, Any]]:
    """The program, its weights mapped from the folder, and the manifest. Every file is checked against its hash."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise SmeltError(f"{path}: the artefact is incomplete, this file is missing; compile or copy it again")
        if _sha256(path) != digest:
            raise SmeltError(f"{path}: content does not match its hash in {MANIFEST}; the file was altered or damaged")
    weights = _weights(folder, manifest)
    return parse_program((folder / PROGRAM).read_text(), weights), manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its own hash and format checked."""
    path = folder / MANIFEST
    if not folder.is_dir() or not path.is_file() or not (folder / SEAL).is_file():
        raise SmeltError(f"{folder}: not a smelt artefact (no {MANIFEST} and {SEAL}), or one that was half copied")
    if _sha256(path) != (folder / SEAL).read_text(errors="replace").strip():
        raise SmeltError(f"{path}: content does not match {SEAL}; the file was altered or damaged")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format") != FORMAT:
        raise SmeltError(
            f"{path}: artefact format {manifest.get('format')}, this smelt reads format {FORMAT}; "
            "update smelt, or compile the artefact again with this version"
        )
    return manifest


def _weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Weight]:
    path = folder / WEIGHTS
    stored = read_header(path)
    weights = {}
    for name, entry in manifest["weights"].items():
        keys = {part: (path, f"{name}/{part}") for part in entry["parts"]}
        missing = [key for _, key in keys.values() if key not in stored]
        if missing:
            raise SmeltError(f"{path}: has no tensor '{missing[0]}'")
        weights[name] = Weight(tuple(entry["shape"]), parse_encoding(entry["encoding"]), Mapped(keys))
    return weights


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """A content hash of a tensor, such as the calibration tokens."""
    flat = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return hashlib.sha256(memoryview(flat)).hexdigest()
