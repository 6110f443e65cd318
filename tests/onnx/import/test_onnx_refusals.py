"""Broken and malicious .onnx files: one line that names the file, the node or tensor, and the way out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from smelt.ir.capture import capture
from smelt.ir.errors import SmeltError

from .graphs import FLOAT, INT64, graph, random, saved


def linear(**changes: Any) -> onnx.ModelProto:
    """y = x w, a sound file; `changes` go to `graph`."""
    options: dict[str, Any] = {
        "nodes": [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "inputs": {"x": (FLOAT, ["batch", 4])},
        "outputs": {"y": (FLOAT, ["batch", 3])},
        "tensors": {"w": random(4, 3)},
    }
    return graph(**(options | changes))


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> dict[str, Any]:
    return {"nodes": [helper.make_node(op, inputs, outputs, "it", **attributes)]}


def without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.initializer[0].ClearField("raw_data")
    return model


def of_shape(model: onnx.ModelProto, *shape: int) -> onnx.ModelProto:
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(shape)
    return model


def of_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    model.opset_import[0].version = version
    return model


def twice(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.initializer.append(model.graph.initializer[0])
    return model


def recursive(model: onnx.ModelProto) -> onnx.ModelProto:
    """A function that calls itself."""
    model.opset_import.append(helper.make_opsetid("own", 1))
    call = helper.make_node("Again", ["a"], ["b"], domain="own")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "Again", ["a"], ["b"], [call], opsets))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Again", ["x"], ["y"], "it", domain="own"))
    return model


MatMul = helper.make_node
CYCLE = [MatMul("Add", ["x", "b"], ["a"], "first"), MatMul("Relu", ["a"], ["b"]), MatMul("Relu", ["b"], ["y"])]
TAKEN = [MatMul("Relu", ["x"], ["y"], "first"), MatMul("Neg", ["x"], ["y"], "second")]
HUGE = [
    MatMul("ConstantOfShape", ["size"], ["many"], "bomb"),
    MatMul("ReduceSum", ["many"], ["sum"], keepdims=0),
    MatMul("Add", ["x", "sum"], ["y"]),
]
SIZE = {"size": np.array([1 << 20, 1 << 20], np.int64)}
BROKEN: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "no values": (lambda: without_data(linear()), r"tensor 'w' of shape \[4, 3\] has no values"),
    "wrong size": (lambda: of_shape(linear(), 4, 4), r"tensor 'w' of shape \[4, 4\] needs 64 bytes, the file holds 48"),
    "absurd size": (lambda: of_shape(linear(), 1 << 40, 1 << 20), r"tensor 'w' of shape .* needs \d+ bytes, the file"),
    "negative size": (lambda: of_shape(linear(), -4, 3), r"tensor 'w' has a negative dimension in \[-4, 3\]"),
    "missing tensor": (lambda: linear(tensors={}), r"'product' \(MatMul → y\) reads 'w', which is neither an input"),
    "missing output": (lambda: linear(outputs={"z": (FLOAT, [1])}), r"nothing computes the output 'z'"),
    "cycle": (lambda: linear(nodes=CYCLE), r"'first' \(Add → a\) reads 'b', which is computed behind it: a cycle"),
    "two of a name": (lambda: linear(nodes=TAKEN), r"'second' \(Neg → y\) computes 'y', a name that is taken"),
    "two tensors": (lambda: twice(linear()), r"two initialisers are called 'w'"),
    "new opset": (lambda: of_opset(linear(), 999), r"opset 999 is newer than onnx .* upgrade onnx"),
    "unknown op": (
        lambda: linear(**node("MatMull", ["x", "w"], ["y"])),
        r"'it' \(MatMull → y\).*did you mean 'MatMul'",
    ),
    "unknown domain": (
        lambda: linear(**node("Fast", ["x"], ["y"], domain="com.example")),
        r"uses com\.example ops, but imports no opset of that domain",
    ),
    "unknown attribute": (
        lambda: linear(**node("Softmax", ["x"], ["y"], axes=1)),
        r"'it' \(Softmax → y\): its attribute 'axes' cannot be imported yet \(did you mean 'axis'\?\)",
    ),
    "recursion": (lambda: recursive(linear()), r"the function own\.Again calls itself"),
    "shapes that do not fit": (lambda: linear(tensors={"w": random(5, 3)}), r"'product' \(MatMul → y\): fails: .*"),
    "huge result": (lambda: linear(nodes=HUGE, tensors=SIZE), r"computes a tensor of \d+ elements from small inputs"),
    "strings": (
        lambda: linear(inputs={"x": (TensorProto.STRING, ["batch"])}, **node("Identity", ["x"], ["y"])),
        r"input 'x': tensors of type STRING have no counterpart in torch",
    ),
    "data decides the shape": (
        lambda: linear(inputs={"x": (INT64, ["batch", 4])}, **node("NonZero", ["x"], ["y"])),
        r"has a shape that depends on values",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    with pytest.raises(SmeltError, match=message) as caught:
        capture(saved(make(), tmp_path, "broken.onnx"))
    assert "\n" not in str(caught.value) and "broken" in str(caught.value)


def test_a_sound_file_is_not_refused(tmp_path: Path) -> None:
    assert capture(saved(linear(), tmp_path)).facts["kind"] == "module"


def external(folder: Path, **entries: Any) -> Path:
    """The sound file with its weight in `weights.bin`, then told otherwise."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    told = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    for key, value in entries.items():
        told[key].value = str(value)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"location": "../secret.bin"}, r"tensor 'w' points to '\.\./secret\.bin'; data must be a file in the model's"),
        ({"location": "/etc/passwd"}, r"tensor 'w' points to '/etc/passwd'"),
        ({"location": "link.bin"}, r"tensor 'w' points to 'link\.bin', a link out of the model's folder"),
        ({"location": "gone.bin"}, r"tensor 'w' is stored in 'gone\.bin', which is missing"),
        ({"length": 40}, r"tensor 'w' needs 48 bytes, its external data is said to be 40 long"),
        ({"offset": 20}, r"tensor 'w' ends at byte 68 of 'weights\.bin', which holds 48: truncated"),
        ({"offset": -4}, r"tensor 'w' ends at byte 44 .*truncated"),
        ({"offset": "x"}, r"offset and length of its external data are not numbers"),
    ],
)
def test_external_data_stays_in_the_folder(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    path = external(tmp_path / "model", **entries)
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(SmeltError, match=message):
        capture(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(SmeltError, match=r"broken\.onnx: "):
        capture(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmeltError, match=r"gone\.onnx: no such file"):
        capture(tmp_path / "gone.onnx")


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(linear(), tmp_path)
    for name in [name for name in sys.modules if name.startswith("smelt.ir.capture.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SmeltError, match=r"pip install 'smelt\[onnx\]'"):
        capture(path)
