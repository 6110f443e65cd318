"""Matrix products and lookups of codes by onnxruntime's own operators, and its fused activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.encoding import Affine
from ...ir.ops import HEAD, LINEAR, QUANTIZED, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from . import form_linear
from .builder import CONTRIB, Builder, Operand, Value
from .forms import Given, Made, form, standard
from .ort_blocks import Blocks, block_tensors, blocks

INT8 = 3  # TensorProto.INT8
INTEGER_PRODUCTS = 4  # the accuracy level of MatMulNBits that rounds what enters it to int8, a scale a block
AMPLIFIED = (
    "the recipe rounds activations: differences of float32 rounding turn single codes, so that logits agree to a "
    "hundredth, as the recipe's own kernels and their reference do"
)


@form("smelt.linear", "smelt.head", style="ort")
def linear(b: Builder, node: fx.Node, a: Given) -> Made:
    """MatMulNBits where the weight is stored in codes, else MatMul."""
    name, bias = a["weight"].weight, a["bias"]
    stored = bias is None or bias.weight is not None
    made = product(b, node, [name], [bias and bias.weight]) if name and stored else None
    return standard(node)(b, node, a) if made is None else made


def product(b: Builder, node: fx.Node, names: Sequence[str], biases: Sequence[str | None]) -> str | None:
    """What enters `node` times matrices one below the other; None if their codes do not go together, or not at all."""
    program: Program = b.shared["program"]
    named = {name: program.weights[name] for name in names}
    source = node.args[0]
    assert isinstance(source, fx.Node)
    bias = _bias(program, names, biases)
    if is_op(source, QUANTIZED):
        asked = arguments(source)
        cut = blocks([*named.values()], most=asked["group"])
        if cut is not None and (asked["bits"], asked["group"]) == (8, cut.block):
            b.note(AMPLIFIED)
            rounded = b.shared["values"][source.args[0]]  # the kernel rounds as the Program does
            return _bits(b, rounded, named, cut, bias)
    cut, rank = blocks([*named.values()]), len(source.meta["shape"])
    return None if cut is None or rank < 2 else _exact(b, b.shared["values"][source], rank, named, cut, bias)


def together(b: Builder, nodes: Sequence[object]) -> str | None:
    """The results of products side by side as one, if they read the same input and store codes that go together.

    Those that others read too stay apart: their codes would be stored twice.
    """
    alone = [n for n in nodes if isinstance(n, fx.Node) and is_op(n, LINEAR, HEAD) and len(n.users) == 1]
    given = [arguments(n) for n in alone]
    first = nodes[0]
    if len(given) < len(nodes) or len({g["x"] for g in given}) > 1 or not isinstance(first, fx.Node):
        return None
    operands = [operand for g in given for operand in (g["weight"], g["bias"]) if operand is not None]
    if any(operand.op != "get_attr" for operand in operands):
        return None
    names = [str(g["weight"].target) for g in given]
    return product(b, first, names, [g["bias"] and str(g["bias"].target) for g in given])


def _exact(
    b: Builder, x: Operand, rank: int, named: Mapping[str, Weight], cut: Blocks, bias: torch.Tensor | None
) -> str:
    """x [..., K] times matrices, as if x were not rounded.

    The kernels for integers are the fast ones (by 4 for a 4-bit matrix and one token, by 70 for an 8-bit one; EPYC,
    2026-11-21), but they round x to int8. So they get two rows for one: x as it is rounded, and what that leaves, which
    in sum is x. The second costs nothing where one token reads a matrix from memory, and errors fall from 6e-3 to 2e-5.
    """
    if b.shared["style"].int8_activations:
        return _bits(b, x, named, cut, bias)
    both = _bits(b, _two_rows(b, x, rank, cut), named, cut, None if bias is None else bias / 2)
    first, second = b.op("Split", both, axis=0, num_outputs=2, outputs=2)
    return str(b.op("Add", first, second))


def _bits(b: Builder, x: Operand, named: Mapping[str, Weight], cut: Blocks, bias: torch.Tensor | None) -> str:
    data, scales = block_tensors(b, named, cut)
    sizes: dict[str, Any] = {"N": b.tensors[scales].dims[0], "K": cut.columns, "bits": cut.bits}
    added = None if bias is None else b.array("bias", bias.numpy())
    sizes |= {"block_size": cut.block, "accuracy_level": INTEGER_PRODUCTS}
    return str(b.op("MatMulNBits", x, data, scales, None, None, added, domain=CONTRIB, **sizes))


def _two_rows(b: Builder, x: Operand, rank: int, cut: Blocks) -> str:
    """`[B, …, K]` as `[2 B, …, K]`: rounded to int8 with a scale a block of K, as the kernel does, and the rest.

    A block of zeros has the scale 0 and undefined codes, which count 0 times whatever they are.
    """
    if rank == 3:
        peak = b.op("MaxPool", b.op("Abs", x), kernel_shape=[cut.block], strides=[cut.block])
    else:
        apart = b.op("Reshape", x, b.const([0] * (rank - 1) + [cut.columns // cut.block, cut.block]))
        peak = b.op("ReduceMax", b.op("Abs", apart), b.const([rank]), keepdims=0)
    scale = b.op("Mul", peak, b.const(1 / 127))
    code = b.op("QuantizeLinear", x, scale, axis=rank - 1, block_size=cut.block, output_dtype=INT8)
    rounded = b.op("DequantizeLinear", code, scale, axis=rank - 1, block_size=cut.block)
    return str(b.op("Concat", rounded, b.op("Sub", x, rounded), axis=0))


def _bias(program: Program, names: Sequence[str], biases: Sequence[str | None]) -> torch.Tensor | None:
    """The biases of all rows, float32; None if there are none."""
    if not any(biases):
        return None
    parts = [
        program.weights[bias].dense() if bias else torch.zeros(program.weights[name].shape[0])
        for name, bias in zip(names, biases, strict=True)
    ]
    return torch.cat(parts)


@form("smelt.experts", style="ort")
def experts(b: Builder, node: fx.Node, a: Given) -> Made:
    """The standard form with products by codes; onnxruntime would make rounding ones of the standard form's."""
    return form_linear.routed(b, a, _times_expert)


def _times_expert(b: Builder, x: Operand, stack: Value, e: int) -> str:
    """Rows [n, K] times one matrix of a stack."""
    program: Program = b.shared["program"]
    whole = program.weights[stack.weight] if stack.weight else None
    if whole is None or not isinstance(whole.encoding, Affine):
        return form_linear.times_expert(b, x, stack, e)
    one = Weight(whole.shape[1:], whole.encoding, {part: value[e] for part, value in whole.parts.items()})
    cut = blocks([one])
    if cut is None:
        return form_linear.times_expert(b, x, stack, e)
    lead = b.const([0, 1])  # an expert may have no rows, and nothing cannot be split in two, nor pooled
    return str(b.op("Squeeze", _exact(b, b.op("Unsqueeze", x, lead), 4, {f"{stack.weight}.{e}": one}, cut, None), lead))


@form("smelt.embedding", style="ort")
def embedding(b: Builder, node: fx.Node, a: Given) -> Made:
    """GatherBlockQuantized on the codes that a tied head multiplies with, else the standard form."""
    program: Program = b.shared["program"]
    name = a["weight"].weight
    cut = blocks([program.weights[name]]) if name else None
    if cut is None:
        return standard(node)(b, node, a)
    shared = form_linear.tied(b, name)
    data, scales = block_tensors(b, {name: program.weights[name]}, cut, flat=not shared)
    if shared:
        data = b.op("Reshape", data, b.const([program.weights[name].shape[0], cut.columns * cut.bits // 8]))
    options: dict[str, Any] = {"bits": cut.bits, "block_size": cut.block, "gather_axis": 0, "quantize_axis": 1}
    return str(b.op("GatherBlockQuantized", data, a["ids"], scales, domain=CONTRIB, **options))


@form("smelt.gated", style="ort")
def gated(b: Builder, node: fx.Node, a: Given) -> Made:
    """act(gate) · up, both by one product where they can be; SiLU is QuickGelu with alpha 1."""
    gate, up = a["gate"], a["up"]
    both = together(b, list(node.args[:2]))
    if both is not None:
        gate, up = b.op("Split", both, axis=len(node.meta["shape"]) - 1, num_outputs=2, outputs=2)
    if a["act"] == "silu":
        return str(b.op("Mul", b.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up))
    return str(b.op("Mul", form_linear.activation(b, a["act"], gate), up))
