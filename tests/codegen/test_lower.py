"""Lowering: every node gets a kernel and a reason, and what has no fast kernel is told or refused."""

from typing import Any

import pytest
import torch

from smelt.codegen.compiler import defines
from smelt.codegen.kernels import Reference
from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.codegen.roles import slow
from smelt.ir.cache import Select
from smelt.ir.encoding import Affine, Bitmap, Codebook, LowRank, Nonuniform, Sum, Tiered
from smelt.ir.errors import SmeltError
from smelt.ir.ops import CACHED_ATTENTION, EMBEDDING, EXPERTS, GATED, HEAD, LINEAR, OPS, QUANTIZED, arguments
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes.activations.quantize import Quantize

from ..ir.programs import FAMILIES, affine_layer, cached, captured, one_call, quantized

aten = torch.ops.aten
CODED = {"sink": 4, "tail": 32, "page": 32, "keys": Affine(8, 32, "channel", True), "values": Affine(8, 16)}


def kernel_of(plan: Plan, op: Any) -> str:
    node = next(plan.program.calls(op))
    return next(str(row["kernel"]) for row in plan.kernels() if row["node"] == node.name)


def unfit(program: Program) -> Program:
    """One linear in groups of fewer columns than its codes unpack to."""
    name = "model.layers.1.mlp.up_proj.weight"
    program.weights[name] = program.weights[name].encoded(Affine(4, 2))
    return program


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_every_computed_node_has_a_kernel_and_a_reason(family: str, target: Any) -> None:
    program = cached(quantized(captured(family), Affine(4, 32)), **CODED)
    plan = lower(program, target)
    rows, fused = plan.kernels(), {node.name for region, _ in plan.regions for node in region.nodes}
    named = [row["node"] for row in rows]
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in OPS:
            assert (node.name in plan.choices) != (node.name in fused) and node.name in named
    for name, choice in plan.choices.items():
        assert choice.why and choice.kernel.name and choice.kernel.source, name
        assert not choice.fallback
    assert bool(fused) == (target == "cpp") and set(named) == plan.choices.keys() | fused
    assert named == [node.name for node in program.graph.nodes if node.name in named]
    told = {"node", "kernel", "why", "fallback", "role", "source"}
    assert all(row.keys() == told and row["role"] == "fast" and all(map(str, row.values())) for row in rows)


def test_the_cpp_target_generates_kernels_for_the_whole_of_a_decoder() -> None:
    plan = lower(cached(quantized(captured("llama"), Affine(4, 32)), **CODED))
    assert {row["kernel"] for row in plan.kernels()} == {
        *("gather.dense", "rows.rms_norm", "rows.rotary", "attention.segments.4x2x16"),
        *("gemv.affine4.g32", "gemv.affine4.g32.add", "gemv.affine4.g32.silu_mul", "gemv.dense.float32"),
    }
    assert lower(plan.program, fallback=False).choices.keys() == plan.choices.keys()


def test_the_torch_target_runs_references() -> None:
    plan = lower(cached(captured("llama")), "torch")
    for op in (LINEAR, EMBEDDING, GATED, CACHED_ATTENTION):
        node = next(plan.program.calls(op))
        choice = plan.choices[node.name]
        assert (choice.kernel.name, choice.why) == (f"torch.{op.name}", "target torch runs the reference")
    assert lower(plan.program, "torch", fallback=False).choices.keys() == plan.choices.keys()


def test_layers_with_equal_sites_share_a_kernel() -> None:
    program = cached(captured("llama"))
    plan = lower(program)
    first, second = (plan.choices[node.name].kernel for node in program.calls(CACHED_ATTENTION))
    assert first is second


def test_every_stored_matrix_is_in_a_region_of_one_kernel() -> None:
    plan = lower(cached(quantized(captured("mixtral"), Affine(4, 32))))
    products = [node for region, _ in plan.regions if region.kind == "product" for node in region.nodes]
    assert {node for op in (LINEAR, HEAD) for node in plan.program.calls(op)} <= set(products)
    assert not {node.name for node in products} & plan.choices.keys()


def test_rounded_activations_make_products_of_integers() -> None:
    program = cached(quantized(captured("llama"), Affine(4, 32)), **CODED)
    Quantize(group=32, head=False).apply(program, None)
    plan = lower(program, fallback=False)
    first = next(program.calls(LINEAR))
    assert kernel_of(plan, LINEAR) == "gemv.affine4.g32.int8" and kernel_of(plan, QUANTIZED) == "rows.rms_norm_quantize"
    weight = str(arguments(first)["weight"].target)
    program.weights[weight] = Weight.of(program.weights[weight].dense())  # its neighbours still read codes
    plan = lower(program)
    assert kernel_of(plan, LINEAR) == "gemv.dense.float32" and kernel_of(plan, QUANTIZED) == "rows.quantized"


def test_a_fallback_is_told_and_names_the_encoding() -> None:
    plan = lower(unfit(captured("llama")))
    (slow,) = [row for row in plan.kernels() if row["fallback"]]
    assert slow["kernel"] == "torch.linear"
    assert "affine(bits=4, group=2" in slow["why"] and "within groups of 2" in slow["why"]


def test_without_fallback_a_weight_is_refused_by_node_and_encoding() -> None:
    with pytest.raises(SmeltError) as caught:
        lower(unfit(captured("llama")), fallback=False)
    message = str(caught.value)
    assert "for 1 nodes of llama" in message and "linear" in message and "affine(bits=4, group=2" in message
    assert "choose another encoding, or allow fallback=True" in message


def test_what_saves_memory_alone_is_told_and_refused_by_weight() -> None:
    program, name = captured("llama"), "model.layers.1.mlp.up_proj.weight"
    whole = program.weights[name]
    program.weights[name] = Weight(whole.shape, *Bitmap().coded(whole.dense()))
    (row,) = [row for row in lower(program).kernels() if row["role"] == "capacity"]
    assert row["kernel"].startswith("gemv.bitmap") and not row["fallback"]  # it has a kernel
    assert f"{name} as bitmap" in row["why"] and "saves memory but no time" in row["why"]
    with pytest.raises(SmeltError, match=rf"for 1 nodes of llama, first {row['node']}: {name} as bitmap.*fallback"):
        lower(program, fallback=False)
    assert not lower(program, "torch", fallback=False).capacity


def test_lossless_codes_are_fast_where_the_cpu_has_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_MARCH", "x86-64-v3")
    assert not defines("__AVX512VBMI2__") and "AVX-512 VBMI2" in (slow(Tiered()) or "")
    monkeypatch.setenv("SMELT_MARCH", "x86-64-v4 -mavx512vbmi -mavx512vbmi2")
    assert defines("__AVX512VBMI2__") and slow(Tiered()) is None
    assert slow(Affine(4, 64)) is None and slow(Bitmap()) is not None


def test_tables_are_fast_where_registers_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELT_MARCH", "x86-64-v4")
    small, large = Nonuniform(4), Codebook(8, 8, shared=True)
    assert slow(small) is None and "2048 entries" in (slow(large) or "")
    assert "2048 entries" in (slow(Sum((large, LowRank(1)))) or "") and "4 products" in (
        slow(Sum((small, LowRank(4)))) or ""
    )
    monkeypatch.setenv("SMELT_MARCH", "x86-64-v3")
    assert "16 entries" in (slow(small) or "")


def test_without_fallback_a_cache_site_is_refused_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    program = cached(captured("llama"), sink=4, tail=32, page=32, select=Select("key_norm", 0.5))
    monkeypatch.setattr("smelt.codegen.attention.covers", lambda site: "no loader for keys")
    with pytest.raises(SmeltError, match=r"first .*attention.*: attention of layer 0: no loader for keys"):
        lower(program, fallback=False)
    plan = lower(program)
    assert kernel_of(plan, CACHED_ATTENTION) == "torch.cached_attention"


def test_experts_run_on_what_is_stored() -> None:
    program = captured("mixtral")
    for name in [name for name in program.weights if "experts" in name]:
        program.weights[name] = program.weights[name].encoded(Affine(4, 32))
    plan = lower(program, fallback=False)
    node = next(plan.program.calls(EXPERTS))
    assert plan.choices[node.name].kernel.name == "experts.gemv.affine4.g32"
    assert plan.encoded[node.name] == ("gate_up", "down")
    name = str(node.args[4].target)  # type: ignore[union-attr]
    program.weights[name] = program.weights[name].encoded(Affine(4, 2))
    assert "experts: gemv of affine(bits=4, group=2" in lower(program).choices[node.name].why


def test_other_types_run_as_torch_ops() -> None:
    inputs: dict[str, tuple[Any, ...]] = {"x": ("B", 8)}
    program = one_call(aten.silu.default, inputs, "$x")
    (node,) = program.calls(aten.silu.default)
    assert lower(program).choices[node.name].kernel.name == "rows.silu"  # no shape was derived: nothing is fused
    node.args[0].meta["dtype"] = torch.float64  # type: ignore[union-attr]
    assert lower(program).choices[node.name].kernel.name == "aten.silu.out"
    layer = affine_layer()
    (linear,) = layer.calls(LINEAR)
    linear.args[0].meta["dtype"] = torch.float16  # type: ignore[union-attr]
    assert "'x' is float16, kernels take float32" in lower(layer).choices[linear.name].why


def test_a_computed_matrix_has_a_reason() -> None:
    program = one_call(LINEAR.target, {"x": ("B", 4), "w": (3, 4)}, "$x", "$w")
    (choice,) = lower(program).choices.values()
    assert isinstance(choice.kernel, Reference) and choice.why == "the matrix is computed, not stored"
    program = one_call(EMBEDDING.target, {"ids": ("B", 4), "w": (3, 4)}, "$ids", "$w")
    (choice,) = lower(program).choices.values()
    assert choice.why == "embedding: the table is computed, not stored"


def test_an_op_without_an_out_variant_runs_and_says_so() -> None:
    (choice,) = lower(one_call(aten.zeros_like.default, {"x": ("B", 4)}, "$x")).choices.values()
    assert choice.kernel.name == "torch.aten.zeros_like.default"
    assert choice.why == "the library op has no out-variant"


def test_views_and_sizes_have_no_kernel() -> None:
    assert not lower(one_call(aten.transpose.int, {"x": ("B", 4)}, "$x", 0, 1)).choices
    assert not lower(one_call(aten.split.Tensor, {"x": ("B", 4)}, "$x", 2, -1)).choices


def test_what_cannot_be_lowered_at_all_is_an_error() -> None:
    with pytest.raises(SmeltError, match="unknown target 'gpu'; known: cpp, torch, triton"):
        lower(affine_layer(), "gpu")  # type: ignore[arg-type]
    program = cached(captured("llama"))
    program.cache = None
    with pytest.raises(SmeltError, match="attention reads a cache, but llama has no cache plan"):
        lower(program)


def test_an_encoded_table_is_looked_up_as_it_is_stored() -> None:
    program = captured("llama")
    node = next(program.calls(EMBEDDING))
    name = str(node.args[1].target)  # type: ignore[union-attr]
    program.weights[name] = Weight.of(program.weights[name].dense()).encoded(Affine(4, 32))
    plan = lower(program, fallback=False)
    assert kernel_of(plan, EMBEDDING) == "gather.affine" and plan.encoded[node.name] == ("weight",)
