"""onnx's own backend cases, run through the importer: file → Program → interpreter, compared with what onnx expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import _normalize_tensor

from smelt.ir.capture.onnx.known import MOST, Known, has_numpy_type
from smelt.ir.capture.onnx.load import Model, from_proto
from smelt.ir.capture.onnx.module import OnnxModule
from smelt.ir.capture.onnx.registry import INTS, NUMBER, find
from smelt.ir.capture.onnx.trace import Feed, trace
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.weight import Weight

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")  # "real" is in test_backend_models.py
PASSED, REFUSED, WRONG, STRINGS = "passed", "refused", "wrong", "strings"
_BITS = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e4m3fnuz": (np.uint8, torch.float8_e4m3fnuz),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
    "float8_e5m2fnuz": (np.uint8, torch.float8_e5m2fnuz),
    "float8_e8m0fnu": (np.uint8, torch.float8_e8m0fnu),
}
_WIDER: dict[str, Any] = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}
_NOISE = {"test_dft_inverse": 1e-6, "test_dft_inverse_opset19": 1e-6}  # where zero is expected, float32 rounding is
# two units in the last place, as onnx's runner allows bfloat16; at 1e-3 it would allow float16 less than one
_ULPS = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: the verdict, why, and the inputs that were given as numbers at import."""

    name: str
    verdict: str
    reason: str = ""
    fixed: tuple[str, ...] = ()


class _Strings(Exception):
    pass


def cases() -> Iterator[Any]:
    """All cases that need no download."""
    for kind in KINDS:
        yield from load_model_tests(kind=kind)


def outcome(case: Any, spoil: Callable[[torch.Tensor], torch.Tensor] = lambda result: result) -> Outcome:
    """Runs a case; `spoil` is put behind every result, to see that a wrong one is noticed."""
    try:
        proto, sets = _data(case)
    except _Strings:
        return Outcome(case.name, STRINGS)
    fixed: set[str] = set()
    try:
        model = from_proto(proto, Path(case.model_dir or "."), case.name)
        for inputs, meant in sets:
            given = [*inputs, *[None] * (len(model.graph.inputs) - len(inputs))]
            made, bound = _run(model, given)
            fixed |= bound
            if len(made) != len(meant):
                return Outcome(case.name, WRONG, f"{len(made)} results, not {len(meant)}")
            atol = max(case.atol, _NOISE.get(case.name, 0.0))
            for mine, theirs in zip(made, meant, strict=True):
                if fault := difference(spoil(mine), theirs, case.rtol, atol):
                    return Outcome(case.name, WRONG, fault)
    except SmeltError as fault:
        return Outcome(case.name, REFUSED, str(fault))
    except Exception as fault:  # a Program that fails when it runs was captured wrongly
        return Outcome(case.name, WRONG, f"{type(fault).__name__}: {fault}")
    return Outcome(case.name, PASSED, "", tuple(sorted(fixed)))


def answers(proto: Any, inputs: list[Any], name: str) -> list[Any]:
    """What the Program of a model gives."""
    return _run(from_proto(proto, Path(), name), inputs)[0]


def difference(mine: Any, theirs: Any, rtol: float, atol: float) -> str | None:
    """How a result differs from what is expected, None if it does not."""
    if mine is None or theirs is None:
        return None if mine is theirs else "a value and no value"
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return f"{mine.dtype} {list(mine.shape)}, not {theirs.dtype} {list(theirs.shape)}"
    rtol = max(rtol, _ULPS.get(mine.dtype, 0.0))
    if mine.dtype.itemsize == 1 and mine.is_floating_point():
        mine, theirs = mine.float(), theirs.float()
    close = torch.isclose(mine.double(), theirs.double(), rtol, atol, equal_nan=True)
    if close.all():
        return None
    return (
        f"{int((~close).sum())} of {close.numel()} values, {mine[~close][0].item()} and not {theirs[~close][0].item()}"
    )


def _data(case: Any) -> tuple[Any, list[tuple[list[Any], list[Any]]]]:
    """The model, and inputs with the results expected, sequences among them flat."""
    if case.data_sets is not None:
        found = [tuple([_normalize_tensor(v) for v in part] for part in pair) for pair in case.data_sets]
        proto = case.model
    else:
        proto = onnx.load(Path(case.model_dir) / "model.onnx")
        stored = {tensor.name for tensor in proto.graph.initializer}
        ports = [p for p in proto.graph.input if p.name not in stored]
        folders = sorted(Path(case.model_dir).glob("test_data_set_*"))
        found = [(_read(f, "input", ports), _read(f, "output", proto.graph.output)) for f in folders]
    return proto, [([_tensor(v) for v in inputs], _flat([_tensor(v) for v in outputs])) for inputs, outputs in found]


def _read(folder: Path, what: str, ports: Sequence[Any]) -> list[Any]:
    values = []
    for i, port in enumerate(ports):
        raw = (folder / f"{what}_{i}.pb").read_bytes()
        if port.type.HasField("sequence_type"):
            values.append(numpy_helper.to_list(onnx.SequenceProto.FromString(raw)))
        else:
            values.append(numpy_helper.to_array(onnx.TensorProto.FromString(raw)))
    return values


def _tensor(value: Any) -> Any:
    if value is None or isinstance(value, list | tuple):
        return None if value is None else [_tensor(v) for v in value]
    array = np.asarray(value)
    name = array.dtype.name
    if array.dtype == object or array.dtype.kind in "SUT":
        raise _Strings
    if name in _BITS:
        bits, dtype = _BITS[name]
        return torch.from_numpy(np.ascontiguousarray(array).view(bits).copy()).view(dtype).reshape(array.shape)
    if name == "float4_e2m1fn":
        return torch.from_numpy(array.astype(np.float32)).to(torch.float8_e4m3fn)
    return torch.from_numpy(np.array(array, _WIDER.get(name, array.dtype), order="C")).reshape(array.shape)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [leaf for v in values for leaf in (_flat(v) if isinstance(v, list | tuple) else [v])]


def _run(model: Model, inputs: list[Any]) -> tuple[list[Any], set[str]]:
    """Results, and the inputs that were given as numbers: none if possible, then those that name axes, sizes and the
    like to an op, then all small integers, then scalars too. A node's sizes and axes are inputs in these cases."""
    names = [port.name for port in model.graph.inputs]
    asked = _numbers(model) & set(names)
    tried: list[set[str]] = []
    refused: SmeltError | None = None
    for level in range(4):
        fixed = {
            n
            for n, t in zip(names, inputs, strict=True)
            if level and (_small(t, True) if n in asked else level > 1 and _small(t, level > 2))
        }
        if fixed in tried or (asked and not level):
            continue
        tried.append(fixed)
        try:
            return _attempt(model, names, inputs, fixed), fixed
        except SmeltError as fault:
            refused = fault
    assert refused is not None
    raise refused


def _numbers(model: Model) -> set[str]:
    """Names of values that some op wants to know while importing."""
    found = set()
    for node in model.graph.nodes:
        rule = find(node.domain, node.op, node.version or 1 << 30)
        for i, name in enumerate(node.inputs if rule is not None else ()):
            kind = rule.inputs[i] if i < len(rule.inputs) else rule.rest
            found |= {name} if kind in (INTS, NUMBER) else set()
    return found


def _small(value: Any, floats: bool) -> bool:
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() > 1
        or value.numel() > MOST
        or not has_numpy_type(value.dtype)
    ):
        return False
    return floats and value.numel() <= 8 if value.is_floating_point() else True


class _Flat(OnnxModule):
    """Results of sequences one by one: a Program returns tensors."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        found = _flat(super().forward(*inputs))
        return tuple(value.tensor() if isinstance(value, Known) else value for value in found)


class _Exact(Weight):
    """A constant in its own type; the interpreter would give all floats in float32."""

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.parts["data"]


def _attempt(model: Model, names: list[str], inputs: list[Any], fixed: set[str]) -> list[Any]:
    feeds: list[Feed] = []
    values: dict[str, torch.Tensor] = {}
    plan: list[Any] = []  # what is known, or the place of a tensor, or those of a sequence

    def place(name: str, tensor: torch.Tensor) -> int:
        feeds.append(Feed(name, tensor.dtype, tuple(tensor.shape)))
        values[name] = tensor
        return len(feeds) - 1

    for name, value in zip(names, inputs, strict=True):
        if value is None or name in fixed:
            plan.append(None if value is None else Known(value.numpy(), value.dtype))
        elif isinstance(value, list):
            plan.append([place(f"{name}.{i}", v) for i, v in enumerate(value)])
        else:
            plan.append(place(name, value))

    def arrange(*tensors: torch.Tensor) -> list[Any]:
        return [
            [tensors[i] for i in part] if isinstance(part, list) else tensors[part] if isinstance(part, int) else part
            for part in plan
        ]

    with torch.no_grad():
        count = len(_Flat(model, exact=True)(*arrange(*values.values())))
        outputs = {f"output{i}": i for i in range(count)}
        program = trace(_Flat(model, exact=True), feeds, arrange, outputs, model.where)
        program.weights = {name: _Exact(w.shape, w.encoding, w.parts) for name, w in program.weights.items()}
        return list(interpret(program, values).values())
