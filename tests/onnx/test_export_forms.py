"""Every form of an op gives what the op gives: one call a graph, run in onnxruntime, sizes left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smelt.codegen.onnx import export
from smelt.ir.interpret import interpret
from smelt.ir.ops import OPS

from ..ir.programs import one_call

onnxruntime = pytest.importorskip("onnxruntime", reason="runs what is exported in onnxruntime")
aten = torch.ops.aten
X, M, C, I = ("B", 6), ("B", "T", 6), ("B", 4, 8), ("B", 4, 8, 8)
CALLS: list[tuple[Any, dict[str, tuple[Any, ...]], tuple[Any, ...]]] = [
    *((getattr(aten, name).default, {"x": X}, ("$x",)) for name in
      ("abs", "neg", "exp", "sin", "cos", "tanh", "sigmoid", "erf", "relu", "floor", "ceil", "round", "sign",
       "reciprocal", "hardswish", "mish", "silu", "gelu", "hardsigmoid", "softplus", "leaky_relu", "elu", "contiguous",
       "zeros_like", "ones_like", "sum", "mean")),
    (aten.gelu.default, {"x": X}, ("$x", )),
    (aten.add.Tensor, {"x": X, "u": (6,)}, ("$x", "$u")),
    (aten.add.Tensor, {"x": X}, ("$x", 2)),
    (aten.sub.Tensor, {"x": X, "u": X}, ("$x", "$u")),
    (aten.mul.Tensor, {"x": X, "u": (1,)}, ("$x", "$u")),
    (aten.div.Tensor, {"x": X}, ("$x", 3.0)),
    (aten.div.Tensor_mode, {"x": X}, ("$x", 0.3)),
    (aten.rsub.Scalar, {"x": X}, ("$x", 1)),
    (aten.remainder.Scalar, {"x": X}, ("$x", 0.7)),
    (aten.pow.Tensor_Scalar, {"x": X}, ("$x", 2)),
    (aten.pow.Tensor_Scalar, {"x": X}, ("$x", 3)),
    (aten.maximum.default, {"x": X, "u": X}, ("$x", "$u")),
    (aten.clamp.default, {"x": X}, ("$x", -0.5, None)),
    (aten.hardtanh.default, {"x": X}, ("$x", )),
    (aten.gt.Scalar, {"x": X}, ("$x", 0)),
    (aten.ne.Tensor, {"x": X, "u": X}, ("$x", "$u")),
    (aten.view.default, {"x": M}, ("$x", [-1, 3, 2])),
    (aten.flatten.using_ints, {"x": M}, ("$x", 1)),
    (aten.unflatten.int, {"x": X}, ("$x", 1, [2, 3])),
    (aten.transpose.int, {"x": M}, ("$x", -1, 0)),
    (aten.permute.default, {"x": M}, ("$x", [2, 0, 1])),
    (aten.unsqueeze.default, {"x": X}, ("$x", -1)),
    (aten.squeeze.dim, {"x": ("B", 1, 6)}, ("$x", 1)),
    (aten.expand.default, {"x": (1, 6)}, ("$x", [3, -1])),
    (aten.repeat.default, {"x": X}, ("$x", [2, 1, 3])),
    (aten.repeat_interleave.self_int, {"x": M}, ("$x", 2, 1)),
    (aten.repeat_interleave.self_int, {"x": M}, ("$x", 3, -1)),
    (aten.cat.default, {"x": X, "u": ("B", 2)}, (["$x", "$u"], -1)),
    (aten.stack.default, {"x": X, "u": X}, (["$x", "$u"], 1)),
    (aten.slice.Tensor, {"x": M}, ("$x", 2, 1, 9223372036854775807, 2)),
    (aten.select.int, {"x": M}, ("$x", 2, -1)),
    (aten.flip.default, {"x": M}, ("$x", [1, 2])),
    (aten.roll.default, {"x": M}, ("$x", [2], [2])),
    (aten.tril.default, {"x": M}, ("$x", 1)),
    (aten.triu.default, {"x": M}, ("$x", )),
    (aten.constant_pad_nd.default, {"x": M}, ("$x", [1, 2, 0, 1], 0.5)),
    (aten.sum.dim_IntList, {"x": M}, ("$x", [-1], True)),
    (aten.mean.dim, {"x": M}, ("$x", [0, 2])),
    (aten.amax.default, {"x": M}, ("$x", [1])),
    (aten.var.correction, {"x": M}, ("$x", [2])),
    (aten.softmax.int, {"x": M}, ("$x", 1)),
    (aten.log_softmax.int, {"x": M}, ("$x", -1)),
    (aten.cumsum.default, {"x": M}, ("$x", 1)),
    (aten.argmax.default, {"x": M}, ("$x", 2)),
    (aten.matmul.default, {"x": M, "u": (6, 3)}, ("$x", "$u")),
    (aten.addmm.default, {"x": (3,), "u": X, "z": (6, 3)}, ("$x", "$u", "$z")),
    (aten.conv1d.default, {"x": C, "w": (6, 2, 3)}, ("$x", "$w", None, [2], [1], [1], 2)),
    (aten.conv2d.default, {"x": I, "w": (6, 4, 3, 3), "b": (6,)}, ("$x", "$w", "$b", [2, 1], [1, 0], [1, 2])),
    (aten.convolution.default, {"x": I, "w": (4, 6, 2, 2)},
     ("$x", "$w", None, [2, 2], [0, 0], [1, 1], True, [1, 1], 1)),
    (aten.max_pool2d.default, {"x": I}, ("$x", [3, 3], [2, 2], [1, 1])),
    (aten.avg_pool2d.default, {"x": I}, ("$x", [2, 2])),
    (aten.adaptive_avg_pool2d.default, {"x": I}, ("$x", [4, 4])),
    (aten.adaptive_avg_pool2d.default, {"x": I}, ("$x", [1, 1])),
    (aten.layer_norm.default, {"x": M, "w": (6,)}, ("$x", [6], "$w")),
    (aten.rms_norm.default, {"x": M}, ("$x", [6])),
    (aten.group_norm.default, {"x": I, "w": (4,), "b": (4,)}, ("$x", 2, "$w", "$b")),
]  # fmt: skip
SMELT: list[tuple[str, dict[str, tuple[Any, ...]], tuple[Any, ...]]] = [
    ("linear", {"x": M, "w": (5, 6), "b": (5,)}, ("$x", "$w", "$b")),
    ("rms_norm", {"x": M, "w": (6,)}, ("$x", "$w", 1e-5, 1.0)),
    ("layer_norm", {"x": M, "w": (6,), "b": (6,)}, ("$x", "$w", "$b", 1e-5)),
    ("quantized", {"x": ("B", "T", 64)}, ("$x", 8, 32)),
    ("quantized", {"x": ("B", "T", 64)}, ("$x", 4, 0)),
    ("hadamard", {"x": ("B", "T", 96)}, ("$x", 32)),
    ("hadamard", {"x": ("B", 4, "T", 6)}, ("$x", 2)),
    *(("gated", {"x": M, "u": M}, ("$x", "$u", act)) for act in ("silu", "gelu", "gelu_tanh", "relu")),
    ("attention", {"q": ("B", 4, "T", 8), "k": ("B", 2, "T", 8), "v": ("B", 2, "T", 6)},
     ("$q", "$k", "$v", None, None, 0.3, True)),
    ("attention", {"q": ("B", 4, "T", 8), "k": ("B", 2, "S", 8), "v": ("B", 2, "S", 6)},
     ("$q", "$k", "$v", None, None, 0.3, False, None, 2.0)),
    ("attention", {"q": ("B", 4, "T", 8), "k": ("B", 2, "T", 8), "v": ("B", 2, "T", 6), "s": (4,)},
     ("$q", "$k", "$v", None, "$s", 0.3, True, 3, 5.0)),
    ("attention", {"q": ("B", 4, "T", 8), "k": ("B", 2, "S", 8), "v": ("B", 2, "S", 6), "m": ("B", 1, 1, "S")},
     ("$q", "$k", "$v", "$m", None, 0.3, False)),
]  # fmt: skip
ALL = [*CALLS, *((next(op.target for op in OPS.values() if op.name == n), s, a) for n, s, a in SMELT)]


def answers(call: Any, folder: Path, sizes: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the op says and what onnxruntime says."""
    target, shapes, args = call
    more = {"rounding_mode": "floor"} if target is aten.div.Tensor_mode else {}
    program = one_call(target, shapes, *args, **more)
    if not (folder / "model.onnx").exists():
        export(program, folder)
    random = torch.Generator().manual_seed(5)
    inputs = {
        name: torch.randn([sizes.get(d, d) for d in shape], generator=random)  # type: ignore[call-overload]
        for name, shape in shapes.items()
    }
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    given = {entry.name for entry in session.get_inputs()}
    found = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in given})[0]
    return interpret(program, inputs)["y"], torch.from_numpy(np.array(found))


@pytest.mark.parametrize("call", ALL, ids=lambda call: str(call[0]))
def test_a_form_says_what_the_op_says(call: Any, tmp_path: Path) -> None:
    for sizes in ({"B": 1, "T": 1, "S": 4}, {"B": 3, "T": 7, "S": 5}):
        ours, theirs = answers(call, tmp_path / "out", sizes)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5, equal_nan=True)
