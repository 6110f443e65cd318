"""Fusion: which nodes share a kernel in decoders, why others do not, and that no region reads what depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from smelt.codegen import fuse as fuse_module
from smelt.codegen.fuse import Chain, Region, fuse
from smelt.codegen.lower import lower
from smelt.ir.capture import capture_module
from smelt.ir.encoding import Affine
from smelt.ir.ops import LINEAR
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.passes.activations.quantize import Quantize
from smelt.runtime.bound import Bound

from ..ir.programs import cached, captured, quantized
from .mutants import mutant

aten = torch.ops.aten
TOLERANCE = 1e-5  # of the largest value


def label(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def shape(region: Region) -> str:
    """`linear·linear>gated`: products and tail of every chain by their ops."""
    chains = ("·".join(map(label, c.products)) + "".join(f">{label(t)}" for t in c.tail) for c in region.chains)
    return f"{region.kind} {' | '.join(chains)}"


def regions(program: Program) -> list[Region]:
    return [region for region, _ in lower(program).regions]


LAYER = [
    "product linear | linear | linear",  # q, k and v
    "product linear>add",  # the output projection, with the residual
    "product linear·linear>gated",
    "product linear>add",
]


def test_a_llama_layer_is_four_products() -> None:
    assert [shape(r) for r in regions(cached(captured("llama")))] == [*LAYER * 2, "product head"]


def test_rounding_joins_the_norm_before_it() -> None:
    program = cached(quantized(captured("llama"), Affine(4, 32)))
    Quantize(group=32).apply(program, None)
    found = regions(program)
    normed, bare = "quantize >rms_norm>quantized", "quantize >quantized"
    first, second, third, fourth = LAYER
    layer = [normed, first, bare, second, normed, third, bare, fourth]
    # the head is stored as it was: its input is rounded by the op itself
    assert [shape(r) for r in found] == [*layer * 2, "product head"]
    assert [r.width for r in found] == [32] * 16 + [None]


class Block(nn.Module):
    """What gpt2 does to a token behind its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.data = noise * 0.2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def block(module: nn.Module, columns: int = 64) -> tuple[Program, dict[str, torch.Tensor], torch.Tensor]:
    """The module's program, an input, and what the module makes of it."""
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    program = capture_module(module.eval(), (x[:3],))
    derive(program)
    (name,) = program.inputs
    with torch.no_grad():
        return program, {name: x}, module(x)


def error(program: Program, inputs: dict[str, torch.Tensor], wanted: torch.Tensor) -> float:
    bound = Bound(lower(program), inputs, None, {})
    bound.run()
    (found,) = bound.outputs.values()
    return float(((found - wanted).abs().max() / wanted.abs().max()).nan_to_num(nan=9.0))


def test_bias_activation_and_residual_are_epilogues() -> None:
    program, inputs, wanted = block(Block())
    assert [shape(r) for r in regions(program)] == ["product linear>gelu", "product linear>add"]
    assert error(program, inputs, wanted) < TOLERANCE
    for right, wrong in (("v0 + o0", "v0 - o0"), ("gelu(b0)", "gelu(v0)"), ("(o1 + b0)", "(o1 + v0)")):
        with mutant(right, wrong):
            assert error(program, inputs, wanted) > 100 * TOLERANCE


class Pointwise(nn.Module):
    """No product at all: numbers, rows and a value a column."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-1, 2, 63))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(functional.silu(x * self.gain) / 3 - x) + 0.25


def test_what_is_left_of_pointwise_nodes_is_a_chain() -> None:
    program, inputs, wanted = block(Pointwise(), 63)
    (region,) = regions(program)
    assert region.kind == "pointwise" and [label(n) for n in region.nodes] == [
        "mul",
        "silu",
        "div",
        "sub",
        "tanh",
        "add",
    ]
    assert error(program, inputs, wanted) < TOLERANCE
    with mutant("r * c[5] + i", "c[5] + i"):
        assert error(program, inputs, wanted) > 100 * TOLERANCE


def test_the_dump_names_what_was_not_taken_and_why() -> None:
    text = "\n".join(map(str, regions(cached(captured("llama")))))
    assert len(text.splitlines()) == 9
    q, out, gate, down, *_, head = text.splitlines()
    assert q.startswith("product: linear, linear_1, linear_2") and "view not taken: it is not pointwise" in q
    assert out == "product: linear_3 → add_3; saves 512*B*T bytes; add_3 is read by 2 nodes"
    assert gate.startswith("product: linear_4 · linear_5 → gated; saves 2048*B*T bytes")
    assert "linear_6 not taken: it is not pointwise" in gate and "add_5 is read by 2 nodes" in down
    assert head == "product: linear_14"
    program = cached(quantized(captured("llama"), Affine(4, 32)))
    Quantize(group=32).apply(program, None)
    text = "\n".join(map(str, regions(program)))
    assert "reshape not taken: no norm" in text and "quantize: rms_norm → quantized" in text


def made(build: Callable[[Callable[..., fx.Node], fx.Node, list[fx.Node]], fx.Node]) -> Program:
    """A program over x [4, 32] with weights w0 to w3 [32, 32] and a vector v."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = [f"w{i}" for i in range(4)]
    weights = {name: Weight.of(torch.randn(32, 32)) for name in names} | {"v": Weight.of(torch.randn(32))}
    stored = [graph.create_node("get_attr", name) for name in weights]
    graph.output({"y": build(lambda target, *args: graph.call_function(target, args), x, stored)})
    program = Program("made", graph, weights, {"inputs": {"x": {"shape": [4, 32], "dtype": "float32"}}})
    derive(program)
    return program


def found(program: Program) -> list[Region]:
    return fuse(program.graph, program.weights, lambda node, width: None)


def notes(program: Program) -> str:
    return " ".join(note for region in found(program) for note in region.notes)


def linear(call: Any, x: fx.Node, weight: fx.Node) -> fx.Node:
    node: fx.Node = call(LINEAR.target, x, weight)
    return node


def test_a_value_that_others_read_is_written() -> None:
    def build(call: Any, x: fx.Node, w: list[fx.Node]) -> fx.Node:
        y = linear(call, x, w[0])
        node: fx.Node = call(aten.add.Tensor, call(aten.silu.default, y), call(aten.sum.dim_IntList, y, [0], True))
        return node

    program = made(build)
    assert [shape(r) for r in found(program)] == ["product linear", "pointwise >silu"]
    assert "linear_default is read by 2 nodes" in notes(program) and "add_tensor not taken: sum_dim" in notes(program)


def test_an_operand_of_another_shape_ends_a_chain() -> None:
    def build(call: Any, x: fx.Node, w: list[fx.Node]) -> fx.Node:
        y = call(aten.add.Tensor, linear(call, x, w[0]), w[4])  # a vector: one value a column
        node: fx.Node = call(aten.mul.Tensor, y, w[1])  # a matrix of another shape than [4, 32]
        return node

    program = made(lambda call, x, w: call(aten.add.Tensor, linear(call, x, w[0]), w[4]))
    assert [shape(r) for r in found(program)] == ["product linear>add"]
    with pytest.raises(Exception, match="mul"):  # [4, 32] * [32, 32] has no shape
        made(build)
    rows = made(
        lambda call, x, w: call(aten.mul.Tensor, linear(call, x, w[0]), call(aten.sum.dim_IntList, x, [1], True))
    )
    assert [shape(r) for r in found(rows)] == ["product linear"]
    assert "mul_tensor not taken: sum_dim_int_list has another shape" in notes(rows)


def test_products_of_other_storage_or_input_do_not_share_a_kernel() -> None:
    def build(call: Any, x: fx.Node, w: list[fx.Node]) -> fx.Node:
        both = call(aten.mul.Tensor, linear(call, x, w[0]), linear(call, call(aten.silu.default, x), w[1]))
        node: fx.Node = call(aten.cat.default, [both, linear(call, x, w[2]), linear(call, x, w[3])])
        return node

    program = made(build)
    assert sorted(shape(r) for r in found(program)) == [
        *("pointwise >silu", "product linear", "product linear | linear", "product linear>mul"),
    ]
    assert "mul_tensor not taken: it is in another kernel" in notes(program)
    program.weights["w3"] = program.weights["w3"].encoded(Affine(8, 32))
    assert "product linear | linear" not in {shape(r) for r in found(program)}


def test_no_region_reads_what_depends_on_it() -> None:
    """a = x W; b = softmax(a); c = a + b: a and c in one kernel would need b first."""

    def build(call: Any, x: fx.Node, w: list[fx.Node]) -> fx.Node:
        a = linear(call, x, w[0])
        node: fx.Node = call(aten.add.Tensor, a, call(aten.softmax.int, a, -1))
        return node

    program = made(build)
    a, b, c = (node for node in program.graph.nodes if node.op == "call_function")
    assert all(set(r.nodes) != {a, c} for r in found(program))
    with pytest.raises(AssertionError, match="a fused region reads what depends on it"):
        fuse_module._check_convex(program.graph, [Region("product", (Chain((a,), (c,)),), c)])
    fuse_module._check_convex(program.graph, [Region("product", (Chain((a,), (b, c)),), c)])


def test_two_regions_that_wait_for_each_other_are_a_cycle() -> None:
    def build(call: Any, x: fx.Node, w: list[fx.Node]) -> fx.Node:
        a, b = linear(call, x, w[0]), linear(call, x, w[1])
        after_a, after_b = linear(call, a, w[2]), linear(call, b, w[3])
        node: fx.Node = call(aten.add.Tensor, after_a, after_b)
        return node

    program = made(build)
    a, b, after_a, after_b, _ = (node for node in program.graph.nodes if node.op == "call_function")
    crossed = [
        Region("product", tuple(Chain((p,), ()) for p in pair), pair[0]) for pair in ((a, after_b), (b, after_a))
    ]
    with pytest.raises(AssertionError, match="depends on it"):
        fuse_module._check_convex(program.graph, crossed)
    fuse_module._check_convex(program.graph, found(program))


class Parallel(nn.Module):
    """Two branches of their own inputs that meet: one takes the sum, the other is read by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.first(x) + self.second(functional.relu(x))


def test_products_that_meet_are_computed_once_each() -> None:
    torch.manual_seed(0)
    program, inputs, wanted = block(Parallel())
    members = [node for region in regions(program) for node in region.nodes]
    assert len(members) == len(set(members)) == 5
    assert error(program, inputs, wanted) < TOLERANCE


def test_what_has_no_kernel_is_in_no_region() -> None:
    program = captured("llama")
    refused = next(program.calls(LINEAR))
    got = fuse(program.graph, program.weights, lambda node, width: "no" if node is refused else None)
    assert refused not in {node for region in got for node in region.nodes}
    assert shape(got[0]) == "product linear | linear"


def test_a_region_runs_where_its_operands_are() -> None:
    """Each stands behind all that it reads and before all that read it."""
    for family in ("llama", "gpt2", "mixtral", "gemma2", "phi3"):
        program = cached(captured(family))
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        for region in regions(program):
            inside = set(region.nodes)
            read = [used for node in inside for used in node.all_input_nodes if used not in inside]
            read = [used for used in read if used.op != "get_attr"]
            readers = [user for node in inside for user in node.users if user not in inside]
            assert all(order[used] < order[region.at] for used in read)
            assert all(order[user] > order[region.at] for user in readers)
