"""`smelt export`: an artefact becomes a folder that other runtimes load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Base
from .show import emit, waiting

if TYPE_CHECKING:
    from ..export_hf import HFExport

KINDS, STYLES = ("onnx", "hf"), ("standard", "ort")


def export(
    artefact: Annotated[Path, typer.Argument(metavar="OUT", help="An artefact's folder.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the export.")] = None,
    to: Annotated[str, typer.Option("--to", help="What to write: onnx, or hf for transformers and vLLM.")] = "onnx",
    style: Annotated[
        str, typer.Option(help="standard: ONNX's own operators; ort: onnxruntime's too, for onnxruntime-genai.")
    ] = "standard",
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not run the export beside the artefact.")] = False,
    allow_decoded: Annotated[
        bool, typer.Option("--allow-decoded", help="Write encodings that the format cannot say as floats.")
    ] = False,
    int8_activations: Annotated[
        bool, typer.Option("--int8-activations", help="Style ort: round activations to 8 bits, faster and less exact.")
    ] = False,
    base: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export an artefact and check what was written by running it.

    \b
    smelt export out.smelt --to onnx -o deploy
    smelt export out.smelt --to onnx --style ort -o deploy
    smelt export out.smelt --to hf -o deploy
    """
    with waiting(f"loading {artefact}") as line:
        from .. import load
        from ..codegen.onnx import check_place
        from ..ir.errors import SmeltError, nearest

        if to not in KINDS:
            raise SmeltError(f"--to {to}{nearest(to, KINDS)}: choose onnx or hf")
        if style not in STYLES:
            raise SmeltError(f"--style {style}{nearest(style, STYLES)}: choose standard or ort")
        if out is None:
            raise SmeltError("nowhere to write: name a folder with -o FOLDER")
        if to == "hf" and (style != "standard" or int8_activations):
            raise SmeltError("--style and --int8-activations are of --to onnx: leave them out")
        check_place(out)
        if to == "hf":
            folder = load(artefact, base=base).export_hf(out, check=not no_check, allow_decoded=allow_decoded)
            emit(_told(folder)) if json else print(folder)
            return
        options = {"int8_activations": True} if int8_activations else {}
        done = load(artefact, base=base).export_onnx(
            out, style, check=not no_check, allow_decoded=allow_decoded, progress=line.say, **options
        )
    if not json:
        print(done)
        return
    written = done.written
    emit(
        {
            "folder": str(written.folder),
            "style": written.style,
            "bytes": written.nbytes,
            "nodes": dict(written.nodes),
            "notes": list(written.notes),
            "checked": [asdict(case) for case in done.cases],
            "unchecked": done.unchecked,
        }
    )


def _told(done: HFExport) -> dict[str, Any]:
    return {
        "folder": str(done.folder),
        "bytes": done.nbytes,
        "matrices": [{**asdict(kind), "count": count} for kind, count in sorted(done.matrices.items())],
        "error": done.error,
        "notes": list(done.notes),
    }
