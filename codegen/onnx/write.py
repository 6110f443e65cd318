"""The folder of an export: protobuf, weights in a file of their own, checked, and moved to its place at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...ir.errors import SmeltError
from ...ir.folders import sha256, whole
from .builder import IR_VERSION, OPSET, Builder, Tensor

MODEL, DATA, MANIFEST = "model.onnx", "model.onnx.data", "smelt.json"
INLINE = 1024  # bytes up to which a tensor lies in the protobuf: shapes are inferred from those alone
ALIGN = 4096  # bytes; runtimes map the data file by pages
MOST = 1 << 31  # bytes that a protobuf may have


def check_place(folder: Path) -> None:
    """Raises SmeltError if `folder` holds anything but an earlier export."""
    if folder.is_file() or (folder.is_dir() and not (folder / MANIFEST).is_file() and any(folder.iterdir())):
        raise SmeltError(f"{folder}: exists and is not an export of smelt; choose another folder")


def model_proto(builder: Builder) -> Any:
    """The model without the tensors that are written beside it."""
    from onnx import helper

    graph = helper.make_graph(builder.nodes, builder.name, builder.inputs, builder.outputs)
    versions = {"": OPSET} | {domain: 1 for domain in builder.domains if domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="smelt")


def write_folder(
    folder: Path,
    model: Any,
    builder: Builder,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    progress: Callable[[str, int, int], None],
    accept: Callable[[Path, Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> int:
    """Write everything beside `folder`, check it there, and move it to its place; returns the bytes of all files."""
    with whole(folder.resolve()) as draft:
        _write(draft, model, builder, files, progress)
        told = {**manifest, "files": {path.name: sha256(path) for path in sorted(draft.iterdir())}}
        (draft / MANIFEST).write_text(json.dumps(told, indent=1), encoding="utf-8")
        if accept is not None:
            told |= accept(draft, told)
            (draft / MANIFEST).write_text(json.dumps(told, indent=1), encoding="utf-8")
        return sum(path.stat().st_size for path in draft.iterdir())


def _write(
    draft: Path, model: Any, builder: Builder, files: Mapping[str, bytes], progress: Callable[[str, int, int], None]
) -> None:
    _write_tensors(draft, model, list(builder.tensors.values()), progress)
    data = model.SerializeToString()
    if len(data) >= MOST:
        raise SmeltError(f"{builder.name}: the graph alone takes {len(data)} bytes, more than a protobuf may have")
    (draft / MODEL).write_bytes(data)
    for name, content in files.items():
        (draft / name).write_bytes(content)
    progress("checking", 0, 1)
    _check(draft / MODEL, builder)


def _write_tensors(draft: Path, model: Any, tensors: list[Tensor], progress: Callable[[str, int, int], None]) -> None:
    """Small tensors go into the model, the others into the data file, one after the other."""
    from onnx import TensorProto

    total, done = sum(tensor.nbytes for tensor in tensors), 0
    large = any(tensor.nbytes > INLINE for tensor in tensors)
    with (draft / DATA).open("wb") if large else open(os.devnull, "wb") as file:
        for tensor in tensors:
            proto = TensorProto(name=tensor.name, data_type=tensor.kind, dims=tensor.dims)
            data = tensor.read()
            if len(data) != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: {len(data)} bytes were read, {tensor.nbytes} announced")
            if tensor.nbytes <= INLINE:
                proto.raw_data = data
            else:
                file.write(b"\0" * (-file.tell() % ALIGN))
                proto.data_location = TensorProto.EXTERNAL
                place = {"location": DATA, "offset": str(file.tell()), "length": str(len(data))}
                for key, value in place.items():
                    proto.external_data.add(key=key, value=value)
                file.write(data)
            model.graph.initializer.append(proto)
            done += tensor.nbytes
            progress("writing weights", done, total)


def _check(path: Path, builder: Builder) -> None:
    """onnx's own checker with shape inference: a model that it refuses is never left behind."""
    from onnx import checker

    try:
        checker.check_model(str(path), full_check=True)
    except Exception as fault:  # its errors share no class: types, shapes and structure each have their own
        raise RuntimeError(f"{builder.name}: onnx refuses the exported graph: {fault}") from fault
