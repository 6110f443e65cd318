"""The CPU GEMV: equal to `x @ decode(W)^T` for every encoding, at ragged shapes, to the bit whatever the batch."""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import sympy
import torch

from smelt.codegen import gemv
from smelt.codegen.build import build, source_of
from smelt.codegen.gemv import Bound, Gemv, covers
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.encoding.base import Parts
from smelt.ir.encoding.expr import Bin, Cast, Const, Expr, Load, k, n
from smelt.ir.errors import SmeltError

from .mutants import mutant

ENCODINGS: list[Encoding] = [
    Dense("float32"),
    Dense("float16"),
    Dense("bfloat16"),
    Affine(4, 64),
    Affine(4, 32, zero=True),
    Affine(4, 0, scale="float32"),
    Affine(4, 96, scale="bfloat16"),
    Affine(8, 64, zero=True),
    Affine(8, 0),
    Affine(2, 64, zero=True),
    Affine(2, 192),
    Affine(4, 3, "channel", zero=True),
]
TOLERANCE = 1e-7  # of the sum of magnitudes, with float32 rounding by 6e-8; 5.5e-8 seen


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(encoding: Encoding, w: torch.Tensor) -> tuple[Bound, torch.Tensor]:
    """The kernel over an encoded weight, and the weight that it stands for."""
    parts, shape = encoding.encode(w), tuple(w.shape)
    return Gemv(encoding).bind(parts, shape), encoding.decode(parts, shape)


def call(kernel: Bound, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((x.shape[0], kernel.shape[0]), float("nan"))
    kernel(x, out, bias)
    return out


def off(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Greatest error relative to the sum of |x| times the row's greatest |w|; NaN counts as infinite.

    That is the size of the sums inside: codes are summed with their offset, which cancels after the group.
    """
    right = x.double() @ w.double().t()
    size = x.double().abs().sum(-1, keepdim=True) * w.double().abs().amax(-1) + 1e-30
    if bias is not None:
        right, size = right + bias, size + bias.abs()
    return float(((y - right).abs() / size).nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("rows", [3, 63, 129])
def test_equals_the_reference_at_ragged_shapes(encoding: Encoding, rows: int) -> None:
    kernel, w = bound(encoding, random(rows, 192))
    bias = random(rows, seed=2)
    for m in (1, 3, 63):
        x = random(m, 192, seed=m)
        assert off(call(kernel, x), x, w) < TOLERANCE
        assert off(call(kernel, x, bias), x, w, bias) < TOLERANCE


@pytest.mark.parametrize("encoding", [Dense("float32"), Dense("float16"), Dense("bfloat16"), Affine(8, 0)], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 17, 63, 129])
def test_rows_that_fill_no_vector(encoding: Encoding, columns: int) -> None:
    kernel, w = bound(encoding, random(5, columns))
    x = random(6, columns, seed=3)
    whole = call(kernel, x)
    assert off(whole, x, w) < TOLERANCE
    assert all(torch.equal(call(kernel, x[m : m + 1]), whole[m : m + 1]) for m in range(6))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_row_does_not_depend_on_its_batch(encoding: Encoding) -> None:
    kernel, _ = bound(encoding, random(66, 384))
    x, bias = random(128, 384, seed=4), random(66, seed=5)
    whole = call(kernel, x, bias)
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 31, 127):
        assert torch.equal(call(kernel, x[:m], bias), whole[:m])
    assert torch.equal(call(kernel, x[50:51], bias), whole[50:51])


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the ziglang package is not installed")
@pytest.mark.parametrize(("encoding", "columns"), [(Dense("float16"), 17), (Affine(4, 64), 192)], ids=str)
def test_clang_keeps_rows_apart_too(monkeypatch: pytest.MonkeyPatch, encoding: Encoding, columns: int) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m ziglang c++ -nostdlib++")
    kernel, w = bound(encoding, random(129, columns))
    x = random(63, columns, seed=11)
    whole = call(kernel, x)
    assert off(whole, x, w) < TOLERANCE
    for m in (1, 2, 3, 5):
        assert torch.equal(call(kernel, x[:m]), whole[:m])


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = random(512, 512), random(2, 512, seed=6)
    results = []
    for count in ("1", "2"):
        monkeypatch.setenv("SMELT_THREADS", count)
        results.append(call(bound(Affine(4, 64), w)[0], x))
    assert torch.equal(*results)


@pytest.mark.parametrize("damage", ["scale", "row", "nibbles", "offset"])
def test_a_wrong_weight_exceeds_the_tolerance(damage: str) -> None:
    encoding = Affine(4, 64)
    w, x = random(63, 192), random(3, 192, seed=7)
    parts = encoding.encode(w)
    right = encoding.decode(parts, (63, 192))
    if damage == "scale":
        parts["scale"] = parts["scale"] * 1.05
    elif damage == "row":
        parts["codes"][17] = 0x88
    elif damage == "nibbles":
        parts["codes"] = (parts["codes"] << 4) | (parts["codes"] >> 4)
    else:
        parts["codes"] = parts["codes"] + 1
    assert off(call(Gemv(encoding).bind(parts, (63, 192)), x), x, right) > 100 * TOLERANCE


MUTANTS = {
    "a row of x that is another's": ("xs[b][5]", "xs[0][5]"),
    "a group left out": ("group = 0; group < groups", "group = 1; group < groups"),
    "a tile that is its neighbour": ("tiles[++s < S ? s : 0]", "tiles[++s < S ? 0 : 0]"),
    "5 % of a scale": ("fma(scale0,", "fma(scale0 * 1.05f,"),
    "a shift in the wrong direction": ("fma(shift, splat(", "fma(-shift, splat("),
    "the last tile left out": ("tiles = (w[1] + 15) / 16", "tiles = w[1] / 16"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_kernel_exceeds_the_tolerance(right: str, wrong: str) -> None:
    kernel, w = bound(Affine(4, 64, zero=True), random(63, 192))
    x = random(3, 192, seed=8)
    with mutant(right, wrong):
        y = call(kernel, x)
    assert off(y, x, w) > 100 * TOLERANCE


@dataclass(frozen=True)
class Halves(Encoding):
    """An encoding that the template has never seen: int8 over two, plus a number a row."""

    name: ClassVar[str] = "halves"

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        mean = x.mean(-1)
        return {"twice": ((x - mean[..., None]) * 2).round().to(torch.int8), "mean": mean}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (parts["twice"].float() / 2 + parts["mean"][..., None]).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        return sympy.Integer(8) * shape[0] * shape[1] + 32 * shape[0]

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        half = Bin("mul", Cast("float32", Load("twice", n * shape[-1] + k, "int8")), Const(0.5, "float32"))
        return Bin("add", half, Load("mean", n, "float32"))

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None


def test_a_new_encoding_needs_no_new_template() -> None:
    kernel, w = bound(Halves(), random(63, 200) * 10)
    x = random(3, 200, seed=9)
    assert off(call(kernel, x), x, w) < TOLERANCE
    assert kernel.name == "gemv.halves"


@pytest.mark.parametrize(
    ("encoding", "shape", "reason"),
    [
        (Affine(4, 64), (8, 96), "not a multiple of group=64"),
        (Affine(4, 6), (8, 96), "do not unpack to whole numbers of columns within groups of 6"),
        (Affine(4, 64), (2, 8, 64), "needs a weight [N, K]"),
        (Dense("int64"), (8, 64), "its values are int64"),
        (Dense("float64"), (8, 64), "'data' is float64"),
    ],
)
def test_what_is_not_covered_has_a_reason(encoding: Encoding, shape: tuple[int, ...], reason: str) -> None:
    assert reason in (covers(encoding, shape) or "")
    with pytest.raises(SmeltError, match="gemv does not cover"):
        Gemv(encoding).bind({}, shape)


def test_parts_that_do_not_fit_are_refused() -> None:
    encoding, shape = Affine(4, 64), (64, 64)
    parts = encoding.encode(random(*shape))
    kernel = Gemv(encoding)
    with pytest.raises(SmeltError, match=r"'scale' is torch\.float32 on cpu, not float16"):
        kernel.bind({**parts, "scale": parts["scale"].float()}, shape)
    with pytest.raises(SmeltError, match="the parts hold"):
        kernel.bind(parts, (128, 64))


def test_parts_of_any_strides_are_packed_alike() -> None:
    w, x = random(63, 192), random(2, 192, seed=12)
    for encoding in (Affine(4, 64), Affine(4, 9, "channel", zero=True), Dense("float16")):
        parts = encoding.encode(w)
        turned = {name: part.t().contiguous().t() for name, part in parts.items()}
        assert any(not part.is_contiguous() for part in turned.values())
        first, second = (Gemv(encoding).bind(p, (63, 192)) for p in (parts, turned))
        assert torch.equal(call(first, x), call(second, x))


def test_inputs_that_do_not_fit_are_refused() -> None:
    kernel, _ = bound(Affine(4, 64), random(8, 64))
    x, out = random(2, 64), torch.empty(2, 8)
    for bad_x, bad_out in ((x.half(), out), (x, out.double()), (random(64, 2).t(), out), (x, torch.empty(3, 8)),
                           (random(2, 63), out), (x, torch.empty(8, 2).t())):  # fmt: skip
        with pytest.raises(SmeltError, match=r"gemv.affine4.g64: needs contiguous float32 x \[M, 64\]"):
            kernel(bad_x, bad_out)
    with pytest.raises(SmeltError, match=r"float32 bias \[8\]"):
        kernel(x, out, torch.zeros(9))


def test_the_kernel_has_a_weight_of_its_own() -> None:
    w, x = random(64, 256).half(), random(1, 256, seed=10)
    parts = {"data": w.clone()}
    kernel = Gemv(Dense("float16")).bind(parts, (64, 256))
    parts.pop("data").fill_(7.0)
    torch.full((64, 256), 7.0).half()  # would take the place of a freed weight
    assert off(call(kernel, x), x, w.float()) < TOLERANCE


def test_names_tell_what_is_spliced() -> None:
    assert gemv.name(Affine(4, 64)) == "gemv.affine4.g64"
    assert gemv.name(Affine(2, 0, zero=True, scale="float32")) == "gemv.affine2.g0.zero.float32"
    assert gemv.name(Affine(4, 32, "channel")) == "gemv.affine4.g32.channel"
    assert gemv.name(Dense("bfloat16")) == "gemv.dense.bfloat16"


def test_bytes_are_those_of_the_parts() -> None:
    assert bound(Affine(4, 64), random(8, 128))[0].nbytes == 8 * 64 + 8 * 2 * 2


def test_the_inner_loop_holds_codes_and_no_scale() -> None:
    text = gemv.source(Affine(4, 64, zero=True))
    inner, outer = text[text.index("for (int64_t step") :].split("const f32x16 scale0", 1)
    assert "codes" in inner and "scale" not in inner and "zero" not in inner
    assert "p_scale0 + " in outer and "p_zero0 + " in outer and "p_codes0" not in outer
    assert "%" not in inner and "/ 32" not in inner.split("\n", 1)[1]


def test_the_built_source_can_be_read() -> None:
    kernel, _ = bound(Affine(4, 64), random(8, 64))
    _, made = kernel._made(False)
    assert gemv.source(Affine(4, 64)).endswith(made.calls[0].function.text)
    assert made.calls[0].function.text in made.source and source_of(build(made.source, "step")) == made.source
    title = "// y = x W^T, W stored as affine(bits=4, group=64, axis=token, zero=False, scale=float16)\n"
    assert made.calls[0].function.text.startswith(title)
