"""Writes a Program as a folder: model.onnx, its weights beside it, and smelt.json, which says how to run it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import SmeltError
from ...ir.program import Program
from .builder import OPSET
from .graph import Progress, build
from .manifest import manifest
from .styles import find_style
from .write import check_place, model_proto, write_folder


@dataclass(frozen=True)
class Exported:
    """What was written: where, how many nodes of each operator, bytes of all files, and remarks."""

    folder: Path
    style: str
    nodes: Mapping[str, int]
    nbytes: int
    notes: tuple[str, ...]
    manifest: Mapping[str, Any]


def export(
    program: Program,
    folder: str | Path,
    style: str = "standard",
    *,
    assets: Mapping[str, bytes] | None = None,
    facts: Mapping[str, Any] | None = None,
    allow_decoded: bool = False,
    progress: Progress | None = None,
    accept: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] | None = None,
    **options: Any,
) -> Exported:
    """Export to `folder`, which appears whole or not at all; an export that stands there is replaced.

    style: `standard` uses operators of ONNX alone, `ort` those of onnxruntime too. assets: the tokenizer's files.
    facts: go into the manifest (recipe, calibration). allow_decoded: an encoding that ONNX cannot say is written as
    float32 instead of refused. accept: is shown the finished folder before it moves to its place, and its manifest;
    what it returns goes into that, what it raises leaves nothing behind. options: the style's own. Raises SmeltError
    naming the node, weight or place at fault.
    """
    if importlib.util.find_spec("onnx") is None:
        raise SmeltError("export to ONNX needs the package onnx: pip install 'smelt[onnx]'")
    if program.depth is not None:
        raise SmeltError(
            f"{program.name} leaves blocks out by a token's position{program.changed_by('decode')}, which one graph "
            "of ONNX does not say: compile it without that step"
        )
    folder, say = Path(folder), progress or (lambda what, done, total: None)
    kind = find_style(style, options)
    check_place(folder)
    builder = build(program, kind, say, allow_decoded)
    described = manifest(builder, program, kind, facts or {})
    files = kind.files(builder, program, assets or {})
    size = write_folder(folder, model_proto(builder), builder, described, files, say, accept)
    nodes = dict(sorted(Counter(node.op_type for node in builder.nodes).items()))
    return Exported(folder, style, nodes, size, tuple(builder.notes), described | {"opset": OPSET})
