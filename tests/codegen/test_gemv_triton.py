"""The Triton GEMV: right in the interpreter at ragged shapes, and compiled for sm_80 and sm_90 without a spill."""

from pathlib import Path

import pytest
import torch

from smelt.codegen import gemv_triton
from smelt.codegen.autotune_triton import Tile, space
from smelt.codegen.gemm_triton import TritonProduct
from smelt.codegen.product_triton import Product
from smelt.ir.encoding import Affine, Dense
from smelt.ir.errors import SmeltError

from . import triton_checks as checks
from .triton_checks import TOLERANCE, compiled, interpreted, product_error

pytest.importorskip("triton", reason="triton is not installed")

# product, n, k
CASES = {
    "float32": (Product(Dense("float32")), 63, 129),
    "float16": (Product(Dense("float16")), 129, 63),
    "one": (Product(Dense("bfloat16")), 1, 1),
    "affine4": (Product(Affine(4, 64)), 129, 192),
    "affine8 row": (Product(Affine(8, 0), act="relu"), 63, 129),
    "affine4 row": (Product(Affine(4, 0), act="silu"), 63, 160),
    "affine2 zero": (Product(Affine(2, 64, zero=True), act="gelu"), 63, 192),
    "channel": (Product(Affine(4, 3, "channel", zero=True, scale="float32"), act="gelu_tanh"), 129, 96),
    "narrow groups": (Product(Affine(4, 8)), 63, 96),
    "gated": (Product(Affine(4, 64), up=Affine(4, 128, zero=True), norm=True, act="silu"), 63, 128),
    "gated by another packing": (Product(Affine(4, 64), up=Affine(8, 0), act="gelu"), 33, 64),
}
GATED = CASES["gated"][0]
TILE = Tile(block_n=16, block_k=64)
SPLIT = Tile(block_n=16, block_k=32, splits=2)
COMPILED = {
    "float16": (Product(Dense("float16")), 96),
    "affine4": (Product(Affine(4, 64)), 96),
    "affine8": (Product(Affine(8, 0)), 96),
    "affine2 zero": (Product(Affine(2, 128, zero=True)), 128),
    "gated": (Product(Affine(4, 64), up=Affine(4, 64), norm=True, act="silu"), 128),
}  # with the registers that one row of x may take; 128 still lets 16 warps of such a kernel share an SM
FOUR_ROWS = 224


@interpreted
@pytest.mark.parametrize(("product", "n", "k"), CASES.values(), ids=CASES)
def test_equals_the_reference_at_ragged_shapes(product: Product, n: int, k: int) -> None:
    for m, tile, extras in ((1, TILE, True), (3, SPLIT, False)):
        assert product_error(product, (m, n, k), torch.float32, tile, extras) < TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_equals_the_reference_in_halves(dtype: torch.dtype) -> None:
    assert product_error(GATED, (2, 33, 128), dtype, SPLIT) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" & 15", " & 7"),
        ("v *= up", "v += up"),
        ("* -8.0", "* -8.4"),
        ("tl.minimum(first + share, steps)", "tl.minimum(first + share, steps - 1)"),
        ("for s in range(0, SPLITS)", "for s in range(1, SPLITS)"),
        ("tl.rsqrt(all_square_0", "tl.rsqrt(1.1 * all_square_0"),
        ("v += tl.load(residual", "v -= tl.load(residual"),
    ],
)
def test_a_wrong_kernel_exceeds_the_tolerance(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    text = gemv_triton.source(GATED)
    assert right in text
    monkeypatch.setattr(gemv_triton, "source", lambda product, rows: text.replace(right, wrong))
    assert product_error(GATED, (1, 33, 128), tile=SPLIT) > 1000 * TOLERANCE[torch.float32]


@interpreted
def test_a_row_is_the_same_alone_and_among_others() -> None:
    product = GATED
    x, gain = torch.randn(4, 256), torch.randn(256)
    weight, up = (encoding.encode(torch.randn(40, 256)) for encoding in product.encodings.values())
    kernels = TritonProduct(product)
    together, alone = torch.empty(4, 40), torch.empty(1, 40)
    kernels(weight, x, together, up=up, gain=gain)
    for row in range(4):
        kernels(weight, x[row : row + 1], alone, up=up, gain=gain)
        assert torch.equal(alone[0], together[row])


@interpreted
def test_split_launches_leave_their_counters_at_zero() -> None:
    kernels, weight = TritonProduct(Affine(4, 64)), Affine(4, 64).encode(torch.randn(63, 256))
    x = torch.randn(1, 256)
    outs = [torch.full((1, 63), float("nan")) for _ in range(3)]
    for out, tile in zip(outs, (SPLIT, SPLIT, TILE), strict=True):
        kernels(weight, x, out, tile=tile)
    assert torch.equal(outs[0], outs[1])
    assert torch.allclose(outs[0], outs[2], rtol=1e-4, atol=1e-4)


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    checks.in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("name", "rows"), [*((name, 1) for name in COMPILED), ("affine4", 4), ("gated", 4)])
def test_compiles_without_a_spill(
    name: str, rows: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    product, most = COMPILED[name]
    tile = space(rows, 2048, 2048, torch.bfloat16)[0]
    assert tile.splits > 1  # the longer of the two ends
    used = checks.usage(
        gemv_triton.kernel(product, rows),
        gemv_triton.signature(product, "bfloat16", bias=True, residual=True, splits=tile.splits),
        gemv_triton.constants(product, tile, rows), tile, capability, tmp_path,
    )  # fmt: skip
    assert used.spilled == 0
    assert used.registers <= (most if rows == 1 else FOUR_ROWS) and used.shared <= 48 * 1024


def test_the_source_is_one_kernel_with_the_encoding_spliced() -> None:
    text = gemv_triton.source(Affine(4, 64, zero=True))
    assert compile(text, "gemv", "exec") and text.count("def gemv(") == 1
    assert "tl.load(zero + " in text and "tl.program_id(0).to(tl.int64) * BLOCK_N" in text
    loads = {line.split("tl.load(codes + ")[1].split(", mask")[0] for line in text.splitlines() if "(codes" in line}
    assert len(loads) == 1  # both fields of a byte come from one load
    assert list(gemv_triton.signature(Product(Affine(4, 64))).values())[:2] == ["*u8", "*fp16"]


def test_scales_multiply_the_sum_of_a_group() -> None:
    text = gemv_triton.source(Affine(4, 64))
    assert "by = tl.load(scale + (group + (n * (K // 64)))" in text and "sum_0 += by * total_0" in text


def test_integer_tables_are_not_covered() -> None:
    with pytest.raises(SmeltError, match="its values are int64"):
        gemv_triton.source(Dense("int64"))


def test_more_rows_are_left_to_the_gemm() -> None:
    with pytest.raises(SmeltError, match="1 to 4 rows of x, not 5; gemm takes any number"):
        gemv_triton.source(Dense("float16"), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("product", "n", "k"), CASES.values(), ids=CASES)
def test_equals_the_reference_on_a_gpu(product: Product, n: int, k: int, dtype: torch.dtype) -> None:
    for m in (1, 2, 3, 4):
        for tile in (None, SPLIT):
            assert product_error(product, (m, n, k), dtype, tile, device="cuda") < 2 * TOLERANCE[dtype]
