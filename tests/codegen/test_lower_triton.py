"""Lowering to Triton: what runs as one launch and why; and the small kernels, interpreted and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from smelt.codegen import nodes_triton, pointwise, pointwise_triton
from smelt.codegen.autotune_triton import Tile
from smelt.codegen.chains_triton import Plain, ProductsKernel, Step, covers
from smelt.codegen.hadamard_triton import HadamardKernel
from smelt.codegen.lower import lower
from smelt.codegen.lower_triton import holds_up
from smelt.codegen.nodes_triton import GatherKernel, RoundKernel
from smelt.codegen.plan import Plan
from smelt.codegen.triton_module import load
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.errors import SmeltError
from smelt.ir.ops import GATED, OPS
from smelt.ir.ops.hadamard import hadamard as turned
from smelt.ir.ops.quantized import quantized as rounded
from smelt.ir.weight import Weight
from smelt.passes.activations.quantize import Quantize

from ..ir.programs import FAMILIES, cached, captured, quantized
from . import triton_checks as checks
from .triton_checks import compiled, interpreted

pytest.importorskip("triton", reason="triton is not installed")

aten = torch.ops.aten
CODED: dict[str, Any] = {
    "sink": 4, "tail": 32, "page": 32, "keys": Affine(8, 32, "channel", True), "values": Affine(8, 16)
}  # fmt: skip
SHAPES = [(1, 1), (3, 63), (2, 1025)]


def products(plan: Plan) -> list[ProductsKernel]:
    return [kernel for _, kernel in plan.regions if isinstance(kernel, ProductsKernel)]


def names(plan: Plan) -> set[str]:
    return {str(row["kernel"]) for row in plan.kernels()}


@pytest.mark.parametrize("family", FAMILIES)
@compiled
def test_every_computed_node_has_a_kernel_and_a_reason(family: str) -> None:
    plan = lower(cached(quantized(captured(family), Affine(4, 32)), **CODED), "triton")
    fused = {node.name for region, _ in plan.regions for node in region.nodes}
    rows = plan.kernels()
    for node in plan.program.graph.nodes:
        if node.op == "call_function" and node.target in OPS:
            assert (node.name in plan.choices) != (node.name in fused)
    assert {row["node"] for row in rows} == plan.choices.keys() | fused
    assert all(row["why"] and row["kernel"] and row["source"] and not row["fallback"] for row in rows)


@compiled
def test_a_llama_is_seven_launches_a_layer() -> None:
    """Norm and query, key, value; rotary and append; attention in two; output; norm, gate and up; down."""
    plan = lower(cached(quantized(captured("llama"), Affine(4, 32)), **CODED), "triton")
    assert set(plan.choices) == {"embedding"} and holds_up(plan) is None
    assert names(plan) == {
        *("triton.gather.dense", "triton.attention.rotary.segments.4x2x16"),
        *("triton.gemv.affine4.g32.rms_norm", "triton.gemv.affine4.g32.rms_norm.silu_mul"),
        *("triton.gemv.affine4.g32.add", "triton.gemv.dense.float32.rms_norm"),
    }
    steps = [kernel.steps for kernel in products(plan)]
    assert len(plan.regions) == 2 * 5 + 1 and all(len(each) == 1 and isinstance(each[0], Step) for each in steps)
    assert len(steps[0][0].outputs) == 3  # type: ignore[union-attr]
    down = steps[3][0]
    assert isinstance(down, Step) and down.residual is not None and down.residual.name == "add_3"


@compiled
def test_rounded_activations_are_read_as_values() -> None:
    program = cached(quantized(captured("llama"), Affine(4, 32)))
    Quantize(8, 32).apply(program, None)
    plan = lower(program, "triton")
    assert {"triton.quantized", "triton.rms_norm"} <= names(plan)
    assert not any("rms_norm." in name for name in names(plan))  # a norm is followed by rounding


@compiled
def test_what_a_product_does_not_take_in_follows_it() -> None:
    """The cap of gemma's logits."""
    (head,) = [k for k in products(lower(cached(captured("gemma2")), "triton")) if len(k.steps) > 1]
    first, rest = head.steps
    assert isinstance(first, Step) and isinstance(rest, Plain)
    assert [pointwise.label(node) for node in rest.nodes] == ["div", "tanh", "mul"]
    assert "gemv" in head.source and "def pointwise" in head.source


@compiled
def test_products_stored_by_columns_are_not_laid_below_each_other() -> None:
    program = cached(quantized(captured("llama"), Affine(8, 16, "channel")))
    steps = products(lower(program, "triton"))[0].steps
    assert len(steps) == 3


@compiled
def test_what_has_no_kernel_is_told_and_refused() -> None:
    program = cached(captured("llama"))
    name = "model.layers.1.mlp.up_proj.weight"
    program.weights[name] = Weight(
        program.weights[name].shape, Dense("float64"), {"data": program.weights[name].dense().double()}
    )
    plan = lower(program, "triton")
    told = [row for row in plan.kernels() if row["fallback"]]
    assert len(told) == 1 and "float64" in str(told[0]["why"])
    with pytest.raises(SmeltError, match=r"target triton has no fast kernel for 1 nodes.*float64.*fallback=True"):
        lower(program, "triton", fallback=False)
    experts = lower(cached(captured("mixtral")), "triton")
    assert "depends on values" in str(holds_up(experts))


@compiled
def test_what_products_cover() -> None:
    assert covers(Affine(4, 32), (64, 64)) is None
    assert covers(Affine(4, 32), (64, 48)) is not None
    assert covers(Dense("float32"), (3, 64, 64)) == "needs a weight [N, K], not [3, 64, 64]"


def chain() -> tuple[list[fx.Node], list[fx.Node], Any]:
    """Every op of a chain of pointwise ops, in an order that keeps values small; its operands, and what it means."""
    graph = fx.Graph()
    x, y, column = (graph.placeholder(name) for name in ("x", "y", "column"))
    node, nodes = x, []
    for target, args, kwargs in (
        (aten.add.Tensor, (y,), {"alpha": 0.5}),
        (aten.mul.Tensor, (column,), {}),
        (aten.silu.default, (), {}),
        (aten.sub.Tensor, (0.25,), {}),
        (aten.tanh.default, (), {}),
        (aten.gelu.default, (), {}),
        (aten.gelu.default, (), {"approximate": "tanh"}),
        (aten.div.Tensor, (0.75,), {}),
        (aten.neg.default, (), {}),
        (GATED.target, (y, "gelu_tanh"), {}),
        (aten.sigmoid.default, (), {}),
        (aten.sub.Tensor, (x,), {"alpha": 0.125}),
        (aten.relu.default, (), {}),
    ):
        node = graph.call_function(target, (node, *args), kwargs)
        nodes.append(node)
    graph.output(node)
    return nodes, [x, y, column], fx.GraphModule(torch.nn.Module(), graph)


def pointwise_error(m: int, n: int, device: str = "cpu", wrong: tuple[str, str] = ("", "")) -> float:
    """The largest difference from torch; rows of an operand lie apart."""
    nodes, operands, meaning = chain()
    assert pointwise.outside(nodes) == operands
    generator = torch.Generator().manual_seed(n)
    x, y, column = (torch.randn(*size, generator=generator).to(device) for size in ((m, n + 3), (m, n), (n,)))
    out = torch.full((m, n), float("nan"), device=device)
    text = pointwise_triton.source(nodes, operands)
    assert wrong[0] in text
    text = text.replace(*wrong) if wrong[0] else text
    pointwise_triton.launch(text, [(x[:, :n], n + 3), (y, n), (column, 0)], out)
    return float((out - meaning(x[:, :n], y, column)).abs().nan_to_num(nan=9.0).max())


def round_error(m: int, n: int, bits: int, group: int, device: str = "cpu") -> float:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(device)
    x[0, :2] = 0.0
    out = torch.full_like(x, float("nan"))
    RoundKernel().bind({"x": x, "bits": bits, "group": group}, out)()
    return float((out - rounded(x, bits, group)).abs().nan_to_num(nan=9.0).max())


def turned_error(m: int, n: int, size: int, device: str = "cpu") -> float:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(device)
    out = torch.full_like(x, float("nan"))
    HadamardKernel().bind({"x": x, "size": size}, out)()
    return float((out - turned(x, size)).abs().nan_to_num(nan=9.0).max())


def gather_error(encoding: Encoding, columns: int, device: str = "cpu") -> float:
    """Of rows of a table; ids that are none of it read NaN."""
    table = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns))
    stored = Weight(tuple(table.shape), encoding, encoding.encode(table))
    on = Weight(stored.shape, encoding, {name: part.to(device) for name, part in stored.parts.items()})
    ids = torch.tensor([[0, 39, 7], [-1, 40, 7]], device=device)
    out = torch.zeros(2, 3, columns, device=device)
    GatherKernel(on).bind({"ids": ids}, out)()
    assert out[1, :2].isnan().all()
    wanted = stored.dense()[[0, 39, 7, 7]]
    return float((out.flatten(0, 1)[[0, 1, 2, 5]].cpu() - wanted).abs().nan_to_num(nan=9.0).max())


TABLES = {
    "dense": (Dense("float32"), 63),
    "halves": (Dense("float16"), 1025),
    "four bits": (Affine(4, 32), 64),
    "eight bits": (Affine(8, 0, zero=True), 33),
}


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_chains_compute_what_torch_does(shape: tuple[int, int]) -> None:
    assert pointwise_error(*shape) < 1e-6


@interpreted
@pytest.mark.parametrize(
    "wrong", [("v1 * 0.5", "v1"), ("gelu_tanh(p8)", "gelu(p8)"), ("silu(p1)", "relu(p1)"), ("0.125", "0.13")], ids=str
)
def test_a_wrong_chain_is_caught(wrong: tuple[str, str]) -> None:
    text = pointwise_triton.source(*chain()[:2])
    assert wrong[0] in text
    assert pointwise_error(3, 63, wrong=wrong) > 1e-5


@interpreted
@pytest.mark.parametrize(
    ("shape", "bits", "group"), [((3, 64), 8, 32), ((1, 63), 4, 0), ((2, 1500), 8, 0), ((5, 48), 8, 3)]
)
def test_activations_are_rounded_to_the_same_bits(shape: tuple[int, int], bits: int, group: int) -> None:
    assert round_error(*shape, bits, group) == 0.0


@interpreted
@pytest.mark.parametrize("shape", [(3, 6, 1), (5, 48, 2), (3, 96, 32), (2, 4096, 2048)], ids=str)
def test_blocks_are_turned(shape: tuple[int, int, int]) -> None:
    assert turned_error(*shape) < 5e-6


@interpreted
@pytest.mark.parametrize(("encoding", "columns"), TABLES.values(), ids=TABLES)
def test_rows_of_a_table_are_looked_up(encoding: Encoding, columns: int) -> None:
    assert gather_error(encoding, columns) < 1e-6


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    checks.in_the_interpreter(__file__)


def sources() -> dict[str, tuple[str, str, dict[str, str], dict[str, Any]]]:
    """By case: the text, its kernel, Triton's types of the arguments, and the constants."""
    table = Weight((4096, 2048), Affine(4, 32), {})
    floats = dict.fromkeys(("x0", "x1", "x2", "y"), "*fp32")
    steps = dict.fromkeys(("x0_row", "x1_row", "x2_row", "y_row", "N"), "i32")
    rows = {"x": "*fp32", "y": "*fp32", "M": "i32", "K": "i32", "levels": "fp32"}
    parts = {"ids": "*i64", "y": "*fp32", "codes": "*u8", "scale": "*fp16", "V": "i32", "K": "i32"}
    block = {"BLOCK": "constexpr"}
    return {
        "pointwise": (
            *(pointwise_triton.source(*chain()[:2]), "pointwise"),
            *({**floats, **steps, **block}, {"BLOCK": pointwise_triton.BLOCK}),
        ),
        "quantized": (
            *(RoundKernel().source, "quantized"),
            *({**rows, "GROUPS": "constexpr", "WIDTH": "constexpr"}, {"GROUPS": 32, "WIDTH": 32}),
        ),
        "hadamard": (
            *(HadamardKernel().source, "hadamard"),
            *(
                {"x": "*fp32", "y": "*fp32", "M": "i32", "factor": "fp32"}
                | dict.fromkeys(("ROWS", "SIZE", "ROUNDS"), "constexpr"),
                {"ROWS": 1, "SIZE": 8192, "ROUNDS": 13},
            ),
        ),
        "gather": (GatherKernel(table).source, "gather", {**parts, **block}, {"BLOCK": nodes_triton.BLOCK}),
    }


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", ["pointwise", "quantized", "hadamard", "gather"])
def test_compiles_without_a_spill(case: str, capability: int, tmp_path: Path) -> None:
    text, name, signature, constants = sources()[case]
    used = checks.usage(getattr(load(text, name), name), signature, constants, Tile(), capability, tmp_path)
    assert used.spilled == 0 and used.registers <= 128


@pytest.mark.gpu
def test_the_small_kernels_on_a_gpu() -> None:
    assert max(pointwise_error(*shape, device="cuda") for shape in SHAPES) < 5e-6
    assert round_error(3, 64, 8, 32, "cuda") < 1e-6 and round_error(2, 1500, 8, 0, "cuda") < 1e-6
    assert max(turned_error(*shape, "cuda") for shape in ((5, 48, 2), (3, 96, 32), (2, 16384, 8192))) < 1e-5
    assert max(gather_error(*table, device="cuda") for table in TABLES.values()) < 1e-6
