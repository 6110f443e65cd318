"""Matrix products, lookups, gated middles and routed experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx

from ...ir.encoding import Affine, Dense
from ...ir.program import Program
from ...ir.weight import Weight
from .builder import Builder, Operand, Value, onnx_type
from .codes import decoded_rows
from .forms import Given, form
from .weights import dequantized, looked_up, matrix, stored

Times: TypeAlias = Callable[[Builder, Operand, Value, int], str]


@form("smelt.linear", "smelt.head")
def linear(b: Builder, node: fx.Node, a: Given) -> str:
    """x Wᵀ + b as MatMul with W stored in columns, so that runtimes see codes, scales and product as one."""
    weight: Value = a["weight"]
    right: Operand = matrix(b, weight.weight) if weight.weight else b.op("Transpose", weight, perm=[1, 0])
    product = b.op("MatMul", a["x"], right)
    return str(product if a["bias"] is None else b.op("Add", product, a["bias"]))


@form("smelt.embedding")
def embedding(b: Builder, node: fx.Node, a: Given) -> str:
    """Rows by ids; codes are looked up before they are decoded."""
    ids, weight = a["ids"], a["weight"]
    program: Program = b.shared["program"]
    encoding = program.weights[weight.weight].encoding if weight.weight else None
    if isinstance(encoding, Dense) and encoding.dtype in ("float16", "bfloat16"):
        data, _, _ = stored(b, weight.weight, turned=False)
        return str(b.op("Cast", b.op("Gather", data, ids), to=onnx_type(torch.float32)))
    if not isinstance(encoding, Affine) or encoding.axis != "token" or encoding.planes > 1:
        return str(b.op("Gather", weight, ids))
    table = program.weights[weight.weight]
    if encoding.width == 8 and not encoding.zero and tied(b, weight.weight):
        return _columns(b, ids, weight.weight, encoding)
    parts = b.once(("rows", weight.weight), lambda: _rows(b, weight.weight, table))
    found = {name: b.op("Gather", value, ids) for name, value in parts.items()}
    return decoded_rows(b, encoding, found, len(ids.shape), int(weight.shape[1]))


def tied(b: Builder, name: str) -> bool:
    """Whether a lookup's table is a product's matrix too."""
    program: Program = b.shared["program"]
    targets = {str(user.target) for user in program.uses(name)}
    return bool(targets & {"smelt.linear.default", "smelt.head.default"}) and looked_up(b, name)


def _rows(b: Builder, name: str, table: Weight) -> dict[str, str]:
    """The parts of a table as they are stored."""
    return {
        part: b.tensor(
            f"{name}.{part}", onnx_type(value.dtype), tuple(value.shape), value.nbytes, partial(_part, table, part)
        )
        for part, value in table.parts.items()
    }


def _part(table: Weight, part: str) -> bytes:
    return bytes(table.parts[part].contiguous().view(torch.uint8).numpy().data)


def _columns(b: Builder, ids: Value, name: str, encoding: Affine) -> str:
    """Rows of a table whose codes the head reads as [K, V]: a gather of columns, then scales."""
    data, scale, _ = stored(b, name, turned=True)
    assert ids.shape is not None
    rank = len(ids.shape)
    to_end = [*range(1, rank + 1), 0]

    def columns(source: str) -> Any:
        return b.op(
            "Cast", b.op("Transpose", b.op("Gather", source, ids, axis=1), perm=to_end), to=onnx_type(torch.float32)
        )

    program: Program = b.shared["program"]
    width = program.weights[name].shape[1]
    if not encoding.group:
        factor = b.op("Unsqueeze", b.op("Cast", b.op("Gather", scale, ids), to=onnx_type(torch.float32)), b.const([-1]))
        return str(b.op("Mul", columns(data), factor))
    groups = width // encoding.group
    apart = b.op("Reshape", columns(data), b.const([0] * rank + [groups, encoding.group]))
    product = b.op("Mul", apart, b.op("Unsqueeze", columns(str(scale)), b.const([-1])))
    return str(b.op("Reshape", product, b.const([0] * rank + [width])))


@form("smelt.gated")
def gated(b: Builder, node: fx.Node, a: Given) -> str:
    """act(gate) · up."""
    return str(b.op("Mul", activation(b, a["act"], a["gate"]), a["up"]))


def activation(b: Builder, name: str, x: Operand) -> str:
    """One of the dialect's activations."""
    if name == "silu":
        return str(b.op("Mul", x, b.op("Sigmoid", x)))
    if name == "relu":
        return str(b.op("Relu", x))
    return str(b.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none"))


def times_expert(b: Builder, x: Operand, stack: Value, e: int) -> str:
    """Rows [n, K] times one matrix [N, K] of a stack: [n, N]."""
    return str(b.op("MatMul", x, _expert(b, stack, e)))


@form("smelt.experts")
def experts(b: Builder, node: fx.Node, a: Given) -> str:
    """Experts by MatMul."""
    return routed(b, a, times_expert)


def routed(b: Builder, a: Given, times: Times) -> str:
    """An expert reads the rows that chose it and adds its share to the result; one that none chose reads nothing."""
    x, chosen, shares, gate_up, down = (a[name] for name in ("x", "chosen", "shares", "gate_up", "down"))
    out = b.op("Mul", x, b.const(0.0))
    inner = int(down.shape[2])
    for e in range(int(gate_up.shape[0])):
        places = b.op("NonZero", b.op("Equal", chosen, b.const(np.array(e, np.int64))))  # [2, n]
        rows = b.op("Gather", places, b.const(np.array(0, np.int64)))
        both = times(b, b.op("Gather", x, rows), gate_up, e)
        gate, up = b.op("Split", both, b.const([inner, inner]), axis=1, outputs=2)
        y = times(b, b.op("Mul", activation(b, a["act"], gate), up), down, e)
        share = b.op("GatherND", shares, b.op("Transpose", places, perm=[1, 0]))
        y = b.op("Mul", y, b.op("Unsqueeze", share, b.const([1])))
        out = b.op("ScatterND", out, b.op("Unsqueeze", rows, b.const([1])), y, reduction="add")
    return str(out)


def _expert(b: Builder, stack: Value, e: int) -> str:
    """One matrix [N, K] of a stack as [K, N]."""
    program: Program = b.shared["program"]
    if stack.weight is None:
        return str(b.op("Transpose", b.op("Gather", stack, b.const(np.array(e, np.int64))), perm=[1, 0]))
    weight = program.weights[stack.weight]
    data, scale, zero = stored(b, stack.weight, turned=True, rows=e)
    if scale is None:
        narrow = getattr(weight.encoding, "dtype", "float32") in ("float16", "bfloat16")
        return str(b.op("Cast", data, to=onnx_type(torch.float32))) if narrow else data
    assert isinstance(weight.encoding, Affine)
    return dequantized(b, weight.encoding, weight.shape[:0:-1], True, (data, scale, zero))
