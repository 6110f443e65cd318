"""Each pattern on its own: it fires on the arithmetic it means, keeps the numbers, and leaves near misses alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from smelt.ir.capture.exported import export, to_program
from smelt.ir.capture.names import all_tensors
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, GATED, LINEAR, RMS_NORM, ROTARY, arguments
from smelt.ir.program import Program
from smelt.ir.raising import raise_program
from smelt.ir.raising.match import Call, Hole, match
from smelt.ir.weight import Weight

aten = torch.ops.aten
K = 16


class Wrapped(nn.Module):
    """A function of stored tensors and inputs, as something to export."""

    def __init__(self, function: Callable[..., Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.model = nn.ParameterDict({name: nn.Parameter(w, False) for name, w in weights.items()})

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.function(self.model, *inputs),)


def traced(function: Callable[..., Any], *inputs: torch.Tensor, **weights: torch.Tensor) -> Program:
    """The program of a function, not raised."""
    module = Wrapped(function, weights)
    exported = export(module, inputs, None, "case")
    stored = {name.removeprefix("model."): Weight.of(w) for name, w in all_tensors(module).items()}
    return to_program(exported, "case", tuple(f"x{i}" for i in range(len(inputs))), ("y",), stored.__getitem__, {})


def raised(function: Callable[..., Any], *inputs: torch.Tensor, **weights: torch.Tensor) -> Program:
    """The raised program, which computes what the function computes."""
    program = traced(function, *inputs, **weights)
    raise_program(program)
    (mine,) = interpret(program, dict(zip(program.inputs, inputs, strict=True))).values()
    torch.testing.assert_close(mine, function(weights, *inputs), rtol=1e-5, atol=1e-6)
    return program


def targets(program: Program) -> set[Any]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


X, W = normal(2, 3, K), normal(K)


def rms(x: torch.Tensor, power: int = 2, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps)


@pytest.mark.parametrize(
    ("function", "offset"),
    [
        (lambda w, x: w["g"] * rms(x), 0.0),
        (lambda w, x: rms(x) * w["g"], 0.0),
        (lambda w, x: rms(x) * (1.0 + w["g"]), 1.0),
        (lambda w, x: F.rms_norm(x, (K,), w["g"], 1e-5), 0.0),
    ],
)
def test_a_norm_by_root_mean_square(function: Any, offset: float) -> None:
    program = raised(function, X, g=W)
    assert targets(program) == {RMS_NORM.target}
    assert [arguments(node)["offset"] for node in program.calls(RMS_NORM)] == [offset]


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: w["g"] * rms(x, power=4),
        lambda w, x: w["g"] * rms(x, dim=1),
        lambda w, x: w["g"] * (x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda w, x: w["g"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - 1e-6)),
        lambda w, x: w["g"][:, None] * rms(x[..., None].expand(-1, -1, -1, K)),
        lambda w, x: rms(x) * torch.add(1.0, w["g"], alpha=2.0),
    ],
    ids=["fourth power", "another dimension", "another numerator", "minus epsilon", "a broadcast weight", "alpha"],
)
def test_what_is_almost_a_norm_stays(function: Any) -> None:
    assert not list(raised(function, X, g=W).calls(RMS_NORM))


def rotate(
    inv: torch.Tensor,
    x: torch.Tensor,
    at: torch.Tensor,
    scale: float | None = 1.0,
    cos: Callable[..., Any] = torch.cos,
    half: int = 4,
) -> torch.Tensor:
    """Llama's rotary embedding; x [B, H, T, D]."""
    angle = (inv[None, :, None].float().expand(at.shape[0], -1, 1) @ at[:, None, :].float()).transpose(1, 2)
    twice = torch.cat((angle, angle), dim=-1)
    c, s = cos(twice), torch.sin(twice)
    if scale is not None:
        c, s = c * scale, s * scale
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * c.unsqueeze(1) + turned * s.unsqueeze(1)


INV, AT, Q = torch.tensor([1.0, 0.3, 0.1, 0.03]), torch.tensor([[0, 1, 2], [7, 8, 9]]), normal(2, 2, 3, 8)


@pytest.mark.parametrize("scale", [1.0, 1.3, None])
def test_rotation_by_position(scale: float | None) -> None:
    program = raised(lambda w, x, at: rotate(w["inv"], x, at, scale), Q, AT, inv=INV)
    assert targets(program) == {ROTARY.target}
    assert [arguments(node)["scale"] for node in program.calls(ROTARY)] == [scale or 1.0]


def test_a_rotation_of_the_first_dims_takes_in_the_rest() -> None:
    def part(w: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return torch.cat((rotate(w["inv"], x[..., :8], at), x[..., 8:]), dim=-1)

    program = raised(part, normal(2, 2, 3, 14), AT, inv=INV)
    assert targets(program) == {ROTARY.target}


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x, at: rotate(w["inv"], x, at, cos=torch.sin),
        lambda w, x, at: rotate(w["inv"], x, at, half=3),
        lambda w, x, at: rotate(w["inv"], x, at + 1),
        lambda w, x, at: torch.cat((rotate(w["inv"], x[..., :8], at), x[..., 6:]), dim=-1) if x.shape[-1] > 8 else x,
    ],
    ids=["two sines", "another half", "moved positions", "not a rotation"],
)
def test_what_is_almost_a_rotation_stays(function: Any) -> None:
    assert not list(raised(function, Q, AT, inv=INV).calls(ROTARY))


def test_a_tail_that_overlaps_is_not_taken_in() -> None:
    def part(w: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return torch.cat((rotate(w["inv"], x[..., :8], at), x[..., 6:]), dim=-1)

    program = raised(part, normal(2, 2, 3, 14), AT, inv=INV)
    assert aten.cat.default in targets(program)


def gelu_new(x: torch.Tensor, slope: float = math.sqrt(2 / math.pi), cubic: float = 0.044715) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(slope * (x + cubic * torch.pow(x, 3.0))))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


@pytest.mark.parametrize("function", [gelu_new, gelu_fast])
def test_gelu_written_out(function: Any) -> None:
    program = raised(lambda w, x: function(x), X)
    assert targets(program) == {aten.gelu.default}
    assert torch.allclose(function(X), F.gelu(X, approximate="tanh"), atol=1e-6)


@pytest.mark.parametrize("options", [{"slope": 0.8}, {"cubic": 0.05}])
def test_what_is_almost_gelu_stays(options: Any) -> None:
    assert aten.gelu.default not in targets(raised(lambda w, x: gelu_new(x, **options), X))


@pytest.mark.parametrize("act", ["silu", "relu", "gelu", "gelu_tanh"])
def test_a_gated_mlp(act: str) -> None:
    plain = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[act]
    for swapped in (False, True):

        def mlp(w: Any, x: torch.Tensor, swapped: bool = swapped) -> torch.Tensor:
            gate, up = plain(F.linear(x, w["gate"])), F.linear(x, w["up"])
            return up * gate if swapped else gate * up

        program = raised(mlp, X, gate=normal(8, K), up=-normal(8, K))
        assert [arguments(node)["act"] for node in program.calls(GATED)] == [act]


def test_a_fused_projection_is_gated_too() -> None:
    def mlp(w: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, w["both"]).chunk(2, dim=-1)
        return F.silu(gate) * up

    assert len(list(raised(mlp, X, both=normal(8, K)).calls(GATED))) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: F.silu(F.linear(x, w["gate"])) * 2.0,
        lambda w, x: F.silu(F.linear(x, w["gate"])) * x[..., :8],
        lambda w, x: F.silu(F.linear(x, w["gate"])) * F.linear(x, w["gate"])[..., :1],
        lambda w, x: F.silu(F.linear(x, w["gate"])) * F.silu(F.linear(x, w["gate"])),
    ],
    ids=["a number", "the stream itself", "a broadcast", "both activated"],
)
def test_what_is_no_gated_mlp_stays(function: Any) -> None:
    assert not list(raised(function, X, gate=normal(8, K)).calls(GATED))


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x @ w["m"].t(),
        lambda w, x: x @ w["m"].T,
        lambda w, x: x @ w["m"].transpose(0, 1),
        lambda w, x: torch.matmul(x, w["m"].transpose(-1, -2)),
        lambda w, x: F.linear(x, w["m"]),
    ],
)
def test_products_with_a_turned_matrix_read_it_as_it_is(function: Any) -> None:
    program = raised(function, X, m=normal(8, K))
    assert targets(program) == {LINEAR.target}
    assert set(program.weights) == {"m"}


@pytest.mark.parametrize(
    "function",
    [lambda w, x: x @ w["m"], lambda w, x: torch.addmm(w["b"], x.view(6, K), w["m"]).view(2, 3, 8)],
)
def test_products_with_a_matrix_stored_by_columns_turn_it_lazily(function: Any) -> None:
    program = raised(function, X, m=normal(K, 8), b=normal(8))
    assert LINEAR.target in targets(program) and aten.addmm.default not in targets(program)
    assert program.weights["m.transposed"].shape == (8, K)
    assert torch.equal(program.weights["m.transposed"].dense(), normal(K, 8).t())


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x @ x.transpose(1, 2),
        lambda w, x: torch.addmm(w["b"], x.view(6, K), w["m"], beta=2.0).view(2, 3, 8),
        lambda w, x: x[0, 0] @ w["m"],
    ],
    ids=["two inputs", "a factor", "a vector"],
)
def test_other_products_stay(function: Any) -> None:
    assert not list(raised(function, X, m=normal(K, 8), b=normal(8)).calls(LINEAR))


def test_attention_with_fewer_key_heads() -> None:
    q, k = normal(2, 4, 3, 8), normal(2, 2, 3, 8)

    def grouped(w: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    program = raised(grouped, q, k)
    assert targets(program) == {ATTENTION.target}
    assert [arguments(node)["scale"] for node in program.calls(ATTENTION)] == [8**-0.5]


def test_attention_with_dropout_stays() -> None:
    program = traced(lambda w, q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), normal(2, 4, 3, 8))
    raise_program(program)
    assert not list(program.calls(ATTENTION))


def test_a_mask_of_ones_is_no_mask() -> None:
    def attend(w: Any, q: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(2, 3).to(torch.bool)
        out: torch.Tensor = torch.ops.smelt.attention(q, q, q, seen, None, 1.0, True)
        return out

    def hides(w: Any, q: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(2, 3).cumsum(-1) < 3
        out: torch.Tensor = torch.ops.smelt.attention(q, q, q, seen, None, 1.0, True)
        return out

    masks = [[arguments(n)["mask"] for n in raised(f, normal(2, 4, 3, 8)).calls(ATTENTION)] for f in (attend, hides)]
    assert masks[0] == [None] and masks[1] != [None]


def test_strides_do_not_matter_after_copies_are_dropped() -> None:
    def fold(w: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x.transpose(1, 2).contiguous()).view(2, -1)

    program = raised(fold, X)
    assert aten.view.default not in targets(program) and aten.contiguous.default not in targets(program)


def test_casts_that_change_the_type_stay() -> None:
    program = raised(lambda w, x: x.to(torch.float64).sum(-1).float(), X)
    assert len(list(program.calls(aten.to.dtype, aten._to_copy.default))) == 2


def test_a_pattern_that_means_something_else_is_told_by_its_numbers(monkeypatch: Any) -> None:
    """The equality that the tests above rest on does fail when a pattern is wrong."""
    from smelt.ir.raising import norm

    monkeypatch.setattr(norm, "_VARIANCE", None)
    wrong = Call((aten.mean.dim,), (Call((aten.pow.Tensor_Scalar,), (Hole("x"), 4)), [-1], True))
    inverse = Call((aten.rsqrt.default,), (Call((aten.add.Tensor,), (wrong, Hole("eps"))),))
    normed = Call((aten.mul.Tensor,), (Hole("x"), inverse), swaps=True)
    monkeypatch.setattr(norm, "_PLAIN", Call((aten.mul.Tensor,), (Hole("weight"), normed), swaps=True))
    with pytest.raises(AssertionError, match="not close"):
        raised(lambda w, x: w["g"] * rms(x, power=4), X, g=W)


def nodes() -> dict[str, fx.Node]:
    """a, b, add = a + b, twice = [a, a], scaled = add(a, b, alpha=2)."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    made = {
        "a": a,
        "b": b,
        "add": graph.call_function(aten.add.Tensor, (a, b)),
        "same": graph.call_function(aten.add.Tensor, (a, a)),
        "scaled": graph.call_function(aten.add.Tensor, (a, b), {"alpha": 2}),
        "cat": graph.call_function(aten.cat.default, ([a, b], -1)),
        "read": graph.create_node("get_attr", "w"),
        "again": graph.create_node("get_attr", "w"),
    }
    made["weights"] = graph.call_function(aten.add.Tensor, (made["read"], made["again"]))
    return made


def test_the_matcher_binds_holes_and_wants_every_argument() -> None:
    n = nodes()
    add = (aten.add.Tensor,)
    both = Call(add, (Hole("x"), Hole("y")))
    assert match(both, n["add"]) == {"x": n["a"], "y": n["b"]}
    assert match(Call(add, (Hole("x"),)), n["add"]) is None, "an argument more than the pattern has"
    assert match(both, n["scaled"]) is None, "a keyword may change the meaning"
    assert match(both, n["a"]) is None
    one = Call(add, (Hole("x"), Hole("x")))
    assert match(one, n["add"]) is None
    assert match(one, n["same"]) == {"x": n["a"]}
    assert match(one, n["weights"]) == {"x": n["read"]}, "two reads of one weight are the same"
    assert match(Call(add, (Hole("y"), 3), swaps=True), n["add"]) is None
    assert match(Call((aten.cat.default,), ([Hole("x"), Hole("y")], -1)), n["cat"]) == {"x": n["a"], "y": n["b"]}
    assert match(Call((aten.cat.default,), ([Hole("x")], -1)), n["cat"]) is None
    assert match(Hole("x"), n["b"], {"x": n["a"]}) is None
