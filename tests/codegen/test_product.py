"""Products of integers: equal to rounding x and multiplying with the decoded weight, on every kind of CPU."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from smelt.codegen import interleave, product
from smelt.codegen.fused import Codes
from smelt.codegen.gemv import covers
from smelt.codegen.loops import K
from smelt.codegen.product import BLOCK, Spec
from smelt.codegen.rows import function as row_function
from smelt.codegen.unit import Unit, call
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.errors import SmeltError
from smelt.ir.ops.quantized import quantized

from .mutants import mutant

CASES: list[tuple[Encoding, int]] = [
    (Affine(4, 32), 32),
    (Affine(4, 64), 64),
    (Affine(4, 64), 32),
    (Affine(4, 0), 32),
    (Affine(4, 0), 192),
    (Affine(8, 32), 32),
    (Affine(8, 0), 64),
    (Affine(4, 64, zero=True), 64),
    (Affine(2, 64, zero=True), 64),
]
every_case = pytest.mark.parametrize(("encoding", "width"), CASES, ids=str)
COLUMNS = 192
MANY = (1, 2, 3, 7, 8, 9, 65)
TOLERANCE = 1e-7  # of the sum of magnitudes; sums within a group are exact, 4e-8 seen
MARCHES = {
    "without 512-bit vectors": ("native -mno-avx512f", "avx2"),
    "AVX2": ("x86-64-v3", "avx2"),
    "SSE4": ("x86-64-v2", "sse4_2"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor, width: int) -> Codes:
    """Buffers for the codes of x."""
    return Codes(*(torch.full(shape, 99, dtype=dtype) for shape, dtype in Codes.shapes(*x.shape, width)))


def multiplied(
    encoding: Encoding, width: int, w: torch.Tensor, x: torch.Tensor, spec: Spec | None = None
) -> torch.Tensor:
    """One unit that rounds x and multiplies; `w` [N, K], or [2, N, K] for a spec of two matrices."""
    spec = spec or Spec(encoding, width=width)
    matrices = w[None] if w.dim() == 2 else w
    (rows, columns), n = x.shape, matrices.shape[1]
    codes, out = rounded(x, width), torch.full((rows, n), float("nan"))
    sizes = (rows, columns, width, codes.codes.shape[2])
    tiles, packed = -(-n // interleave.ROWS), []
    for matrix in matrices:
        parts = interleave.pack(encoding.expr((None, K)), encoding.encode(matrix), n, torch.Tensor.contiguous)
        for part in parts.values():
            packed += [part, part.shape[1] if part.dim() > 2 else 0]
    words = (rows, columns, *codes, 1, tiles, 0, tiles, n, out, n, *packed)
    Unit([
        call(row_function("quantize_rows"), x, *codes, *sizes, writes=list(codes)),
        call(product.function(spec, "product"), *words, writes=[out]),
    ])()  # fmt: skip
    return out


def off(y: torch.Tensor, encoding: Encoding, width: int, w: torch.Tensor, x: torch.Tensor) -> float:
    """Greatest error relative to the sum of |x| times the row's greatest |w|; NaN counts as infinite."""
    meant = quantized(x, 8, width).double()
    stored = encoding.decode(encoding.encode(w), tuple(w.shape)).double()
    size = meant.abs().sum(-1, keepdim=True) * stored.abs().amax(-1) + 1e-30
    return float(((y - meant @ stored.t()).abs() / size).nan_to_num(nan=float("inf")).max())


@every_case
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_equals_the_plain_meaning(encoding: Encoding, width: int, rows: int) -> None:
    assert covers(encoding, (rows, COLUMNS), width) is None
    w = random(rows, COLUMNS)
    for m in MANY:
        x = random(m, COLUMNS, seed=m)
        assert off(multiplied(encoding, width, w, x), encoding, width, w, x) < TOLERANCE, m


@every_case
def test_a_row_does_not_depend_on_its_batch(encoding: Encoding, width: int) -> None:
    w, x = random(63, COLUMNS), random(65, COLUMNS, seed=1)
    whole = multiplied(encoding, width, w, x)
    for m in MANY:
        assert torch.equal(multiplied(encoding, width, w, x[:m]), whole[:m])
    assert torch.equal(multiplied(encoding, width, w, x[61:62]), whole[61:62])


@pytest.mark.parametrize("width", [4, 20, 32, 192])
def test_codes_are_those_of_the_op(width: int) -> None:
    """Codes, scales and sums, also of rows that are 0 and of ties; what lies behind the last row is not written."""
    for m in MANY:
        x = random(m, 960, seed=m)
        x[0, :192], x[-1, 192:] = 0, torch.arange(768) % 255 - 127.0
        codes = rounded(x, width)
        sizes = (m, 960, width, codes.codes.shape[2])
        Unit([call(row_function("quantize_rows"), x, *codes, *sizes, writes=list(codes))])()
        wide = BLOCK if m > 1 else 1
        plain = codes.codes.transpose(1, 2).reshape(-1, 960)
        scales, sums = (each.transpose(1, 2).reshape(-1, 960 // width) for each in codes[1:])
        values = (plain[:m].unflatten(1, (-1, width)) * scales[:m, :, None]).flatten(1)
        assert plain.shape[0] == -(-m // wide) * wide and (plain[m:] == 99).all() and (scales[m:] == 99).all()
        assert torch.equal(values, quantized(x, 8, width))
        assert torch.equal(plain[:m].unflatten(1, (-1, width)).sum(-1), sums[:m])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad: float) -> None:
    x = random(9, COLUMNS)
    x[2, 70] = bad
    y = multiplied(Affine(4, 32), 32, random(5, COLUMNS), x)
    assert y[2].isnan().all() and y[:2].isfinite().all() and y[3:].isfinite().all()


def test_the_largest_sums_are_exact() -> None:
    """Codes of 127 and -127 against codes of 255 and 0 over a whole row: no step of 16 bits saturates."""
    encoding, columns = Affine(8, 0, zero=True, scale="float32"), 4096
    w = torch.zeros(16, columns)
    w[:, ::2] = 255.0
    for sign in (1.0, -1.0):
        x = torch.full((9, columns), 127.0 * sign)
        want = 255.0 * 127.0 * sign * columns / 2
        assert (multiplied(encoding, columns, w, x) == want).all()


def test_two_matrices_share_a_kernel() -> None:
    encoding, width = Affine(4, 64), 64
    w, x = random(2, 63, COLUMNS), random(9, COLUMNS, seed=2)
    both = multiplied(encoding, width, w, x, Spec(encoding, 2, width, ("const f32x16 p = v0 * v1;",), "p"))
    first, second = (multiplied(encoding, width, matrix, x) for matrix in w)
    assert torch.equal(both, first * second)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels of x86-64")
@pytest.mark.parametrize(("march", "needs"), MARCHES.values(), ids=MARCHES)
def test_every_instruction_set_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch, march: str, needs: str) -> None:
    if needs not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {needs}")
    x = random(9, COLUMNS, seed=3)
    for encoding, width in ((Affine(4, 64, zero=True), 64), (Affine(8, 0), 32)):
        w = random(33, COLUMNS)
        native = multiplied(encoding, width, w, x)
        with monkeypatch.context() as patch:
            patch.setenv("SMELT_MARCH", march)
            y = multiplied(encoding, width, w, x)
            assert torch.equal(multiplied(encoding, width, w, x[:1]), y[:1])
        assert off(y, encoding, width, w, x) < TOLERANCE
        if "v2" not in march:  # which has no fused multiplication and addition
            assert torch.equal(y, native)
    with monkeypatch.context() as patch, mutant("code[s], four)", "code[s], -four)"):
        patch.setenv("SMELT_MARCH", march)
        assert off(multiplied(encoding, width, w, x), encoding, width, w, x) > 100 * TOLERANCE


MUTANTS = {
    "5 % of a scale": ("scale * by,", "scale * by * 1.05f,"),
    "no offset": ("= -8 * sums[", "= 0 * sums["),
    "another row's scale": ("scales[group * W + b]", "scales[group * W]"),
    "another row's codes": ("+ 4 * b)", ")"),
    "a group left out": ("for (int64_t group = 0;", "for (int64_t group = 1;"),
    "signed bytes": ("& 15)", "& 7)"),
    "a scale rounded to 128": ("g, 127.0f)", "g, 128.0f)"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(right: str, wrong: str) -> None:
    encoding, width = Affine(4, 32), 32
    w, x = random(63, COLUMNS), random(9, COLUMNS, seed=4)
    with mutant(right, wrong):
        y = multiplied(encoding, width, w, x)
    assert off(y, encoding, width, w, x) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("encoding", "shape", "width", "reason"),
    [
        (Affine(4, 32), (8, 96), 64, "rows of 96 are no multiple of the 64 activations"),
        (Affine(4, 32), (8, 192), 64, "activations in groups of 64 do not divide its groups of 32"),
        (Affine(4, 64), (8, 192), 6, "activations in groups of 6 do not divide its groups of 64"),
        (Dense("float16"), (8, 192), 32, "its values are not multiples of an integer code"),
        (Affine(4, 32, "channel"), (32, 192), 32, "its values are not multiples of an integer code"),
        (Dense("int64"), (8, 64), 32, "its values are int64"),
    ],
)
def test_what_is_not_covered_has_a_reason(encoding: Encoding, shape: tuple[int, ...], width: int, reason: str) -> None:
    assert reason in (covers(encoding, shape, width) or "")
    if shape[1] % width == 0:
        with pytest.raises(SmeltError, match="gemv does not cover"):
            _ = Spec(encoding, width=width).inner
