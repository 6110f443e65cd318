"""The row-wise kernels: right against the ops' references, whatever the strides, and every row by itself."""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from smelt.codegen.rows import RowKernel, function, row_kernel, row_stride
from smelt.codegen.unit import call
from smelt.ir.errors import SmeltError
from smelt.ir.ops import ATTENTION, GATED, HADAMARD, LAYER_NORM, OPS, QUANTIZED, RMS_NORM, ROTARY

from .mutants import mutant

aten = torch.ops.aten
TOLERANCE = 2e-6  # of the largest value of a result; float32 sums of at most 1,100 terms
ROWS, WIDTHS = (1, 63, 129), (1, 15, 16, 63, 129, 256)
ACTIVATIONS: dict[str, tuple[Any, dict[str, str], Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": (aten.gelu.default, {"approximate": "none"}, functional.gelu),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}, partial(functional.gelu, approximate="tanh")),
    "relu": (aten.relu.default, {}, functional.relu),
    "sigmoid": (aten.sigmoid.default, {}, torch.sigmoid),
    "silu": (aten.silu.default, {}, functional.silu),
    "tanh": (aten.tanh.default, {}, torch.tanh),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel(target: Any) -> RowKernel:
    found = row_kernel(target)
    assert isinstance(found, RowKernel)
    return found


def run(target: Any, like: torch.Tensor, **args: Any) -> torch.Tensor:
    out = torch.full(like.shape, float("nan"))
    kernel(target).bind(args, out)()
    return out


def off(result: torch.Tensor, target: Any, **args: Any) -> float:
    """Greatest error relative to the largest value of the reference; NaN counts as infinite."""
    want = OPS[target].reference(**args).double()
    return float(((result - want).abs().max() / want.abs().max().clamp_min(1e-3)).nan_to_num(nan=float("inf")))


def norm_args(target: Any, rows: int, width: int) -> dict[str, Any]:
    args = {"x": random(rows, width) * 3 + 1, "weight": random(width, seed=1), "eps": 1e-5}
    return args | ({"offset": 1.0} if target is RMS_NORM.target else {"bias": random(width, seed=2)})


def rotary_args(
    heads: int = 3, tokens: int = 5, dim: int = 40, pairs: int = 8, transposed: bool = True, batch: int = 2
) -> dict[str, Any]:
    x = random(batch, tokens, heads, dim).transpose(1, 2) if transposed else random(batch, heads, tokens, dim)
    positions = torch.arange(batch * tokens).view(batch, tokens) * 7
    return {"x": x, "positions": positions, "inv_freq": torch.logspace(0, -4, pairs), "scale": 1.3}


def gated_args(act: str, rows: int, width: int) -> dict[str, Any]:
    gate, up = (random(2, rows, 2 * width) * 3).chunk(2, -1)
    return {"gate": gate, "up": up, "act": act}


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rms_norm": (RMS_NORM.target, norm_args(RMS_NORM.target, 63, 129)),
    "layer_norm": (LAYER_NORM.target, norm_args(LAYER_NORM.target, 63, 129)),
    "rotary": (ROTARY.target, rotary_args(tokens=63)),
    "quantized": (QUANTIZED.target, {"x": random(63, 129), "bits": 8, "group": 43}),
    "hadamard": (HADAMARD.target, {"x": random(63, 96), "size": 32}),
    **{f"gated {act}": (GATED.target, gated_args(act, 63, 129)) for act in ("silu", "gelu", "gelu_tanh", "relu")},
    **{
        name: (target, {"self": random(63, 258)[:, :129] * 3} | more) for name, (target, more, _) in ACTIVATIONS.items()
    },
}
every_case = pytest.mark.parametrize(("target", "args"), CASES.values(), ids=CASES)


def first(args: dict[str, Any]) -> torch.Tensor:
    return next(iter(args.values()))


@pytest.mark.parametrize("target", [RMS_NORM.target, LAYER_NORM.target], ids=str)
def test_norms_equal_the_reference_at_ragged_shapes(target: Any) -> None:
    for rows, width in product(ROWS, WIDTHS[1:]):
        args = norm_args(target, rows, width)
        assert off(run(target, args["x"], **args), target, **args) < TOLERANCE, (rows, width)


def test_norms_of_one_value_and_without_bias_or_offset() -> None:
    for x in (random(3, 1), random(2, 3, 20) * 1e-4, torch.zeros(2, 17)):
        weight = random(x.shape[-1], seed=1)
        plain = {"x": x, "weight": weight, "eps": 1e-6, "offset": 0.0}
        assert off(run(RMS_NORM.target, x, **plain), RMS_NORM.target, **plain) < TOLERANCE
        centred = {"x": x, "weight": weight, "bias": None, "eps": 1e-6}
        assert off(run(LAYER_NORM.target, x, **centred), LAYER_NORM.target, **centred) < TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_equals_the_reference_to_the_bit(bits: int) -> None:
    for rows, (width, group) in product(ROWS, [(1, 1), (15, 5), (64, 32), (129, 0), (256, 64)]):
        args = {"x": random(rows, width), "bits": bits, "group": group}
        assert torch.equal(run(QUANTIZED.target, args["x"], **args), QUANTIZED.reference(**args)), (rows, width)


def test_the_hadamard_transform_equals_the_reference() -> None:
    """Blocks shorter than a vector, of one, and of many; the last vector ends within."""
    for rows, (width, size) in product(ROWS, [(3, 1), (6, 2), (20, 4), (24, 8), (48, 16), (96, 32), (1024, 1024)]):
        args = {"x": random(rows, width), "size": size}
        assert off(run(HADAMARD.target, args["x"], **args), HADAMARD.target, **args) < TOLERANCE, (rows, width, size)


@pytest.mark.parametrize("transposed", [True, False])
def test_rotary_equals_the_reference(transposed: bool) -> None:
    """Ragged tokens; heads rotated wholly, in part, and wider than a vector of angles."""
    for tokens, (dim, pairs) in product(ROWS, [(64, 32), (40, 8), (6, 1)]):
        args = rotary_args(3, tokens, dim, pairs, transposed)
        assert off(run(ROTARY.target, args["x"], **args), ROTARY.target, **args) < TOLERANCE
    wide = rotary_args(2, 3, 1100, 530, transposed)
    assert off(run(ROTARY.target, wide["x"], **wide), ROTARY.target, **wide) < TOLERANCE


def test_rotary_is_as_exact_at_late_positions() -> None:
    """Against angles in doubles: of a float32 angle beyond 1e5 a reduction in float32 would leave few bits."""
    args = rotary_args(1, 63, 64, 32, batch=1) | {"inv_freq": torch.logspace(0, -0.01, 32), "scale": 1.0}
    for start in (0, 8191, 131_072, 1_000_000):
        args["positions"] = start + torch.arange(63)[None]
        angles = (args["positions"].float()[..., None] * args["inv_freq"]).double()[:, None]
        u, v = args["x"].double().chunk(2, -1)
        want = torch.cat([u * angles.cos() - v * angles.sin(), v * angles.cos() + u * angles.sin()], -1)
        assert (run(ROTARY.target, args["x"], **args) - want).abs().max() < TOLERANCE, start


MARCHES = {"native": "fpu", "x86-64-v3": "avx2", "x86-64-v2": "sse4_2"}


@pytest.mark.parametrize(("march", "needs"), MARCHES.items())
def test_appended_tokens_are_rounded_as_torch_rounds(march: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any bits, all halves and what lies between two; behind what the tail holds, rows of whole vectors and others."""
    if needs not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {needs}")
    monkeypatch.setenv("SMELT_MARCH", march)
    halves = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
    between = (halves + halves.roll(1)) / 2
    near = torch.nextafter(between, torch.tensor(torch.inf))
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 16,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([halves, between, near, bits.int().view(torch.float32)])
    for dtype, dim in product((torch.float16, torch.bfloat16, torch.float32), (16, 24)):
        tokens = x.numel() // 2 // dim
        key = x[: 2 * tokens * dim].view(1, tokens, 2, dim).transpose(1, 2)
        tail, counts = torch.zeros(1, 2, tokens + 3, dim, dtype=dtype), torch.tensor([[0, 0, 3, 3]], dtype=torch.int32)
        words = (key, *key.stride()[:3], 1, 2, tokens, dim, tail, tokens + 3, counts)
        call(function(f"append_{str(dtype).removeprefix('torch.')}"), *words, writes=[tail])()
        want, number = key.to(dtype), torch.int32 if dtype is torch.float32 else torch.int16
        same = tail[:, :, 3:].view(number) == want.contiguous().view(number)
        assert (same | (want.isnan() & tail[:, :, 3:].isnan())).all(), dtype
        assert not tail[:, :, :3].any()


def test_rotary_takes_positions_that_rows_share() -> None:
    args = rotary_args(tokens=9)
    for positions in (torch.arange(9)[None], torch.arange(9)[None].expand(2, -1), torch.arange(18).view(2, 9)[:, :9]):
        shared = args | {"positions": positions}
        assert off(run(ROTARY.target, args["x"], **shared), ROTARY.target, **shared) < TOLERANCE


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_equals_the_reference_on_halves_of_a_tensor(act: str) -> None:
    for rows, width in product(ROWS, WIDTHS):
        args = gated_args(act, rows, width)
        assert off(run(GATED.target, args["gate"], **args), GATED.target, **args) < TOLERANCE, (rows, width)
        apart = args | {"up": args["up"].contiguous()}
        assert torch.equal(run(GATED.target, args["gate"], **apart), run(GATED.target, args["gate"], **args))


@every_activation
def test_activations_are_those_of_torch(name: str) -> None:
    """To 3e-7 of the larger of the input and 1, over all of their range."""
    target, more, meaning = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-30, 30, 9001), torch.tensor([0.0, -0.0, 1e-20, -1e-7, 0.2999, 0.3001, 100, -100])])
    y = run(target, x, **{"self": x, **more})
    assert ((y - meaning(x.double())).abs() < 3e-7 * x.abs().clamp_min(1)).all()
    small = torch.tensor([1e-3, -1e-3, 1e-6])
    close = run(target, small, **{"self": small, **more})
    assert torch.allclose(close.double(), meaning(small.double()), rtol=1e-6, atol=0)


@every_activation
def test_activations_keep_nan_and_make_none(name: str) -> None:
    target, more, _ = ACTIVATIONS[name]
    x = torch.tensor([float("nan"), float("inf"), 3e38, 1.0] * 5)
    y = run(target, x, **{"self": x, **more})
    assert torch.equal(y.isnan(), x.isnan())


@every_case
def test_a_row_does_not_depend_on_the_others(target: Any, args: dict[str, Any]) -> None:
    """Bit for bit: alone, among few, at another place; strided among others, contiguous alone."""
    axis = 2 if target is ROTARY.target else first(args).dim() - 2
    whole = run(target, first(args), **args)
    moving = [n for n, v in args.items() if isinstance(v, torch.Tensor) and v.dim() > 1]
    for start, end in ((0, 1), (5, 6), (62, 63), (3, 20), (1, 63)):
        for copy in (False, True):
            part = dict(args)
            for name in moving:
                at = 1 if name == "positions" else axis
                part[name] = args[name].narrow(at, start, end - start)
                part[name] = part[name].contiguous() if copy or kernel(target).contiguous(part) else part[name]
            assert torch.equal(run(target, first(part), **part), whole.narrow(axis, start, end - start))


@every_case
def test_threads_do_not_change_a_bit(target: Any, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    many = {n: torch.cat([v] * 15) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for n, v in args.items()}
    results = []
    for count in ("1", "2"):
        monkeypatch.setenv("SMELT_THREADS", count)
        results.append(run(target, first(many), **many))
    assert torch.equal(*results)


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the ziglang package is not installed")
@every_case
def test_clang_keeps_rows_apart_too(target: Any, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m ziglang c++ -nostdlib++")
    test_a_row_does_not_depend_on_the_others(target, args)
    if target in OPS:
        assert off(run(target, first(args), **args), target, **args) < TOLERANCE


MUTANTS = {
    "5 % scale": ("rms_norm", "* s * (read(w", "* s * 1.05f * (read(w"),
    "no offset": ("rms_norm", "+ offset)", "+ 0 * offset)"),
    "a dropped row": (
        "layer_norm",
        "c[5], [&](int64_t r) {\n    const float* in",
        "c[5] - 1, [&](int64_t r) {\n    const float* in",
    ),
    "the tail left out of the variance": ("layer_norm", "j = k - i; j < 16", "j = 0; j < 16"),
    "rotated the other way": ("rotary", "fma(u, cosine, -(v * sine))", "fma(u, cosine, v * sine)"),
    "a quarter of a turn off": ("rotary", "((q + 1) & 2)", "(q & 2)"),
    "the rest not passed": ("rotary", "i = 2 * r; i < dim", "i = 2 * r + 1; i < dim"),
    "rounded to other steps": ("quantized", "g, real(c[6]))", "g, real(c[6]) + 1)"),
    "a step too long": ("quantized", "scale) * scale", "scale) * scale * 1.05f"),
    "gate and up swapped": (
        "gated silu",
        "const float *gate = (const float*)c[1] + r * c[6], *up",
        "const float *up = (const float*)c[1] + r * c[6], *gate",
    ),
    "a stride forgotten": ("gated relu", "*gate = (const float*)c[1] + r * c[6]", "*gate = (const float*)c[1] + r * k"),
}


@pytest.mark.parametrize(("case", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(case: str, right: str, wrong: str) -> None:
    target, args = CASES[case]
    with mutant(right, wrong):
        out = run(target, first(args), **args)
    assert off(out, target, **args) > 100 * TOLERANCE


def test_what_a_kernel_does_not_take_is_refused() -> None:
    x, out = random(4, 8), torch.empty(4, 8)
    norm = {"x": x, "weight": torch.ones(8), "eps": 1e-5, "offset": 0.0}
    with pytest.raises(
        SmeltError, match=r"rows\.rms_norm: 'weight' is torch\.float16, the kernel takes torch\.float32"
    ):
        kernel(RMS_NORM.target).bind(norm | {"weight": torch.ones(8).half()}, out)
    with pytest.raises(SmeltError, match=r"'x' has strides \(1, 4\); bind a contiguous copy"):
        kernel(RMS_NORM.target).bind(norm | {"x": random(8, 4).t()}, out)
    with pytest.raises(SmeltError, match=r"gate \[4, 8\] and up \[8\] must have one shape"):
        kernel(GATED.target).bind({"gate": x, "up": torch.ones(8), "act": "silu"}, out)
    args = rotary_args()
    with pytest.raises(SmeltError, match=r"'positions' is torch\.int32, the kernel takes torch\.int64"):
        kernel(ROTARY.target).bind(args | {"positions": args["positions"].int()}, torch.empty(args["x"].shape))
    assert row_kernel(ATTENTION.target) == "no C++ template"


def test_arguments_to_copy_are_those_whose_strides_do_not_fit() -> None:
    gate, up = random(2, 3, 16).chunk(2, -1)
    takes = kernel(GATED.target).contiguous
    assert takes({"gate": gate, "up": up}) == ()
    assert takes({"gate": gate, "up": random(2, 8, 3).transpose(1, 2)}) == ("up",)
    assert takes({"gate": random(2, 6, 8)[:, :3], "up": up}) == ("gate",)
    assert kernel(ROTARY.target).contiguous(rotary_args()) == ()
    assert kernel(ROTARY.target).contiguous({"x": random(1, 2, 8, 3).mT}) == ("x",)


@given(st.data())
def test_the_stride_between_rows_finds_every_row(data: st.DataObject) -> None:
    """A tensor of any strides is refused, or its rows stand where the stride says."""
    x = torch.arange(4096).view(data.draw(st.sampled_from([(8, 8, 64), (1, 64, 64), (2, 4, 8, 64), (64, 64)])))
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, x.dim() - 1))
        match data.draw(st.sampled_from(["slice", "unsqueeze", "transpose", "step"])):
            case "slice":
                size = data.draw(st.integers(1, x.shape[dim]))
                x = x.narrow(dim, data.draw(st.integers(0, x.shape[dim] - size)), size)
            case "unsqueeze":
                x = x.unsqueeze(dim)
            case "transpose":
                x = x.transpose(dim, 0)
            case "step":
                x = x[(slice(None),) * dim + (slice(None, None, 2),)]
    step = row_stride(x)
    if step >= 0:
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        assert torch.equal(torch.as_strided(x, (rows, width), (step, 1), x.storage_offset()), x.reshape(rows, width))
    else:
        assert not x.is_contiguous() or x.shape[-1] == 1
