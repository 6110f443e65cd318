"""Bound plans: equal to the interpreter, over buffers that are shared only where nothing alive lies in them."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional

from smelt.codegen.lower import lower
from smelt.codegen.unit import Unit
from smelt.ir.cache import Cache
from smelt.ir.capture import capture_module
from smelt.ir.encoding import Affine, Encoding
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.passes.activations.quantize import Quantize
from smelt.runtime.bound import Bound
from smelt.runtime.pool import Pool

from ..codegen.mutants import mutant
from ..ir.programs import FAMILIES, cached, captured, quantized

aten = torch.ops.aten
TOLERANCE = 1e-5  # of the largest value; two layers in float32


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (rows, count), generator=torch.Generator().manual_seed(seed))
    return {"tokens": ids, "positions": torch.arange(count).repeat(rows, 1)}


def bind(program: Program, inputs: dict[str, torch.Tensor], target: Any = "cpp", **options: Any) -> Bound:
    return Bound(lower(program, target), {n: v.clone() for n, v in inputs.items()}, None, {}, **options)


def ran(bound: Bound) -> dict[str, torch.Tensor]:
    bound.run()
    return {name: value.clone() for name, value in bound.outputs.items()}


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Greatest error of any output relative to its largest value; NaN counts as infinite."""
    assert found.keys() == wanted.keys() and all(found[n].shape == wanted[n].shape for n in wanted)
    errors = [(found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp_min(1e-3) for n in wanted]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_equals_the_interpreter(family: str, target: Any) -> None:
    program = captured(family)
    for rows, count in ((1, 1), (2, 7), (3, 33)):
        inputs = tokens(rows, count)
        bound = bind(program, inputs, target)
        assert off(ran(bound), interpret(program, inputs)) < TOLERANCE
        other = tokens(rows, count, seed=1)  # the buffers of a second run hold what the first left there
        for name, value in other.items():
            bound.inputs[name].copy_(value)
        assert off(ran(bound), interpret(program, other)) < TOLERANCE
        assert all(torch.equal(bound.inputs[n], other[n]) for n in other)


@pytest.mark.parametrize("encoding", [Affine(4, 32), Affine(8, 0), Affine(4, 32, zero=True)], ids=str)
def test_equals_the_interpreter_on_encoded_weights(encoding: Encoding) -> None:
    program = quantized(captured("llama"), encoding)
    inputs = tokens(2, 9)
    assert off(ran(bind(program, inputs)), interpret(program, inputs)) < TOLERANCE


def test_a_wrong_epilogue_exceeds_the_tolerance() -> None:
    program, inputs = captured("llama"), tokens(2, 9)
    for right, wrong in (
        ("(o0 + v0)", "(o0 - v0)"),
        ("silu(v0) * v1", "silu(v1) * v0"),
        ("w[3] + 16 *", "w[3] + 15 *"),
    ):
        with mutant(right, wrong):
            bound = bind(program, inputs)
        assert off(ran(bound), interpret(program, inputs)) > 100 * TOLERANCE


def test_a_decoder_is_one_unit() -> None:
    plan, inputs = lower(cached(captured("llama"))), tokens(2, 7)
    assert plan.program.cache is not None
    cache = Cache(plan.program.cache, 2, 16)
    cache.begin(inputs["positions"])
    bound = Bound(plan, inputs, cache, {})
    (whole,) = bound.calls
    assert isinstance(whole, Unit)
    nodes = {node.name for node in bound.plan.program.graph.nodes}
    assert {call.node for call in whole.calls} - {""} <= nodes and len(whole.timed()) == len(whole.calls)


class Strange(nn.Module):
    """Halves, transposes, several results, views that must copy, and results that are inputs or weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(24, 64), nn.Linear(32, 24), nn.LayerNorm(24)
        self.table = nn.Parameter(random(24, seed=5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, second = self.up(self.norm(x)).chunk(2, -1)
        y = self.down(functional.gelu(first) * torch.tanh(second))
        turned = (y.view(-1, 4, 6).transpose(1, 2) + x.view(-1, 4, 6).transpose(1, 2)).reshape(-1, 24)
        best, places = turned.topk(5, -1)
        return turned, best, places.float(), y[:, ::2], torch.cat([x, self.table.expand_as(x)], -1), x.t()


@pytest.mark.parametrize("rows", [1, 3, 129])
def test_equals_a_plain_module(rows: int) -> None:
    module = Strange().eval()
    program = capture_module(module, (random(5, 24),))
    derive(program)
    x = random(rows, 24, seed=3)
    (name,) = program.inputs
    with torch.no_grad():
        wanted = dict(zip(program.outputs, module(x), strict=True))
    for target in ("cpp", "torch"):
        assert off(ran(bind(program, {name: x}, target)), wanted) < TOLERANCE


class Converted(torch.nn.Module):
    """Values that change their type on the way, and change it back."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = (x * 10).double()
        return wide.float(), wide.round().float(), (x * 10).to(torch.int32).to(torch.int8).float(), (x * 2).half()


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_a_change_of_type_is_no_copy_of_bytes(target: Any) -> None:
    module = Converted().eval()
    program = capture_module(module, (random(5, 24),))
    derive(program)
    x = random(3, 24, seed=3)
    (name,) = program.inputs
    wanted = dict(zip(program.outputs, module(x), strict=True))
    assert off(ran(bind(program, {name: x}, target)), wanted) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_activations_equal_the_interpreter(family: str) -> None:
    """To the bits of the plain meaning of `quantized`, but where a value lies between two codes: few texts have one."""
    plain = quantized(captured(family), Affine(4, 32))
    program = plain.fork()
    Quantize(group=32).apply(program, None)
    errors = []
    for seed, (rows, count) in enumerate(((1, 1), (1, 5), (2, 4), (3, 3), (2, 9))):
        inputs = tokens(rows, count, seed)
        wanted = interpret(program, inputs)
        errors.append(off(ran(bind(program, inputs)), wanted))
        assert off(interpret(plain, inputs), wanted) > 100 * TOLERANCE
    assert sorted(errors)[2] < TOLERANCE and max(errors) < 0.1


@pytest.mark.parametrize("bits", [None, 4])
def test_the_last_tokens_logits_are_those_of_all(bits: int | None) -> None:
    program = captured("llama") if bits is None else quantized(captured("llama"), Affine(bits, 32))
    inputs, last = tokens(3, 7), torch.tensor([6, 0, 3])
    whole, some = ran(bind(program, inputs)), ran(bind(program, inputs, last=last))
    assert some["logits"].shape == (3, 1, 97)
    assert torch.equal(some["logits"][:, 0], whole["logits"][torch.arange(3), last])


def graph(build: Any, shapes: dict[str, tuple[int, ...]]) -> Program:
    """A program over float32 inputs; `build(graph, nodes)` returns the outputs by name."""
    made = fx.Graph()
    nodes = {name: made.placeholder(name) for name in shapes}
    made.output(build(made, nodes))
    program = Program(
        "made", made, {}, {"inputs": {n: {"shape": list(s), "dtype": "float32"} for n, s in shapes.items()}}
    )
    derive(program)
    return program


def test_results_may_be_inputs_weights_and_one_another() -> None:
    def build(g: fx.Graph, nodes: dict[str, fx.Node]) -> dict[str, fx.Node]:
        table = g.create_node("get_attr", "table")
        total = g.call_function(aten.add.Tensor, (nodes["x"], table))
        return {
            "x": nodes["x"],
            "table": table,
            "total": total,
            "again": total,
            "turned": g.call_function(aten.t.default, (total,)),
        }

    made = fx.Graph()
    x = made.placeholder("x")
    made.output(build(made, {"x": x}))
    program = Program("made", made, {"table": Weight.of(random(3, seed=1))}, {})
    inputs = {"x": random(2, 3)}
    assert off(ran(bind(program, inputs)), interpret(program, inputs)) == 0


def steps(g: fx.Graph, values: list[fx.Node], kind: str, a: fx.Node, b: fx.Node) -> fx.Node:
    """One more value of shape [4, 6]."""

    def call(target: Any, *args: Any) -> fx.Node:
        return g.call_function(target, args)

    match kind:
        case "add":
            return call(aten.add.Tensor, a, b)
        case "multiply":
            return call(aten.mul.Tensor, a, b)
        case "silu":
            return call(aten.silu.default, a)
        case "turn":
            turned = call(aten.transpose.int, a, 0, 1)
            return call(aten.transpose.int, call(aten.add.Tensor, turned, call(aten.transpose.int, b, 0, 1)), 0, 1)
        case "halves":
            parts = call(aten.split.Tensor, a, 3, 1)
            left, right = call(operator.getitem, parts, 0), call(operator.getitem, parts, 1)
            return call(aten.cat.default, [right, call(aten.tanh.default, left)], 1)
        case "sort":
            return call(operator.getitem, call(aten.topk.default, a, 6), 0)
        case "copying view":
            return call(
                aten.reshape.default, call(aten.reshape.default, call(aten.transpose.int, a, 0, 1), [24]), [4, 6]
            )
        case "unread":
            call(aten.add.Tensor, a, b)
            return call(aten.slice.Tensor, a, 0, 0, 4)
    raise AssertionError(kind)


KINDS = ("add", "multiply", "silu", "turn", "halves", "sort", "copying view", "unread")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    chosen = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=14))

    def build(g: fx.Graph, nodes: dict[str, fx.Node]) -> dict[str, fx.Node]:
        values = list(nodes.values())
        for kind in chosen:
            a, b = (values[draw(st.integers(max(0, len(values) - 6), len(values) - 1))] for _ in range(2))
            values.append(steps(g, values, kind, a, b))
        count = draw(st.integers(1, 3))
        return {f"y{i}": values[draw(st.integers(0, len(values) - 1))] for i in range(count)} | {"last": values[-1]}

    return graph(build, {"x": (4, 6), "z": (4, 6)})


class Hoarding(Pool):
    """A pool that never hands a block out twice."""

    def give(self, storage: torch.UntypedStorage) -> None:
        return None


@settings(max_examples=60)
@given(programs())
def test_sharing_buffers_changes_nothing(program: Program) -> None:
    _sharing_changes_nothing(program, "torch")


@settings(max_examples=15)
@given(programs())
def test_sharing_buffers_changes_nothing_between_kernels(program: Program) -> None:
    """Fewer, for each is compiled; what is shared when is decided alike."""
    _sharing_changes_nothing(program, "cpp")


def _sharing_changes_nothing(program: Program, target: str) -> None:
    inputs = {"x": random(4, 6), "z": random(4, 6, seed=1)}
    shared = bind(program, inputs, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smelt.runtime.bound.Pool", Hoarding)
        apart = bind(program, inputs, target)
    first, alone = ran(shared), ran(apart)
    assert all(torch.equal(first[n], alone[n]) for n in alone)
    assert off(first, interpret(program, inputs)) < TOLERANCE
    again = ran(shared)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(shared.inputs[n], inputs[n]) for n in inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_buffers_saves_most_of_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, inputs = captured(family), tokens(2, 33)
    shared = bind(program, inputs)
    monkeypatch.setattr("smelt.runtime.bound.Pool", Hoarding)
    apart = bind(program, inputs)
    first, alone = ran(shared), ran(apart)
    assert all(torch.equal(first[n], alone[n]) for n in alone)
    assert shared.nbytes < 0.6 * apart.nbytes


def test_the_comparison_catches_a_block_that_is_given_back_under_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Bound._release

    def eager(self: Bound, node: fx.Node) -> None:
        self._holders = dict.fromkeys(self._holders, 1)
        right(self, node)

    monkeypatch.setattr(Bound, "_release", eager)
    program, inputs = captured("llama"), tokens(2, 7)
    bound = bind(program, inputs)
    try:
        error = off(ran(bound), interpret(program, inputs))
    except RuntimeError:  # torch saw that an op wrote over what it read
        error = 1.0
    assert error > 100 * TOLERANCE


def test_results_and_inputs_are_never_handed_out_again() -> None:
    program, inputs = captured("gemma2"), tokens(2, 7)
    bound = bind(program, inputs)
    free = {block.data_ptr() for block in bound._pool.free}
    kept = (*bound.outputs.values(), *bound.inputs.values(), *bound._decoded.values())
    assert free and not free & {value.untyped_storage().data_ptr() for value in kept}


def test_a_block_serves_what_fits_and_not_what_would_waste_it() -> None:
    pool = Pool()
    block = pool.take(torch.empty(100, device="meta"))
    assert pool.allocated == 448  # 400 bytes in whole lines
    pool.give(block.untyped_storage())
    assert pool.take(torch.empty(28, device="meta")).data_ptr() == block.data_ptr()
    pool.give(block.untyped_storage())
    assert pool.take(torch.empty(27, device="meta")).data_ptr() != block.data_ptr()
    small = pool.take(torch.empty(0, 5, dtype=torch.int64, device="meta"))
    assert small.shape == (0, 5) and small.dtype == torch.int64


def test_a_cache_is_asked_for() -> None:
    plan = lower(cached(captured("llama")))
    with pytest.raises(SmeltError, match="reads a cache: run this program through generate or with a cache"):
        Bound(plan, tokens(1, 1), None, {})
    assert plan.program.cache is not None
    cache = Cache(plan.program.cache, 1, 8)
    inputs = tokens(1, 1)
    cache.begin(inputs["positions"])
    assert off(ran(Bound(plan, inputs, cache, {})), interpret(captured("llama"), inputs)) < TOLERANCE
