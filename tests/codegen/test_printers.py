"""One tile expression, four printings: PyTorch, C++ by element, C++ by vector and Triton text all equal `decode`."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sympy
import torch

from smelt.codegen.build import build
from smelt.codegen.hoist import folded
from smelt.codegen.printers import cpp, triton
from smelt.codegen.printers import torch as reference
from smelt.codegen.printers.prelude import PRELUDE
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.encoding.expr import Const, Expr, Index, Load, k, loads, n, substitute

K = sympy.Symbol("K", integer=True, positive=True)
c, lane = sympy.symbols("c lane", integer=True, nonnegative=True)
ENCODINGS = [
    Dense("float32"),
    Dense("float16"),
    Dense("bfloat16"),
    Affine(4, 64),
    Affine(4, 32, zero=True, scale="bfloat16"),
    Affine(4, 32, "channel"),
    Affine(8, 0),
    Affine(8, 48, zero=True, scale="float32"),
    Affine(2, 64, zero=True),
    Affine(3, 64, zero=True),
    Affine(3, 64, "channel"),
    Affine(2, 64, "channel", zero=True),
]
ROWS, COLUMNS = 64, 192


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMELT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def encoded(encoding: Encoding) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    parts = encoding.encode(x)
    return parts, encoding.decode(parts, (ROWS, COLUMNS))


@pytest.mark.parametrize("columns", [COLUMNS, K], ids=["constant", "symbol"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_torch_equals_decode(encoding: Encoding, columns: int | sympy.Symbol) -> None:
    parts, decoded = encoded(encoding)
    rows, cols = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None, :]
    expr = encoding.expr((None, columns))
    assert torch.equal(reference.evaluate(expr, parts, rows, cols, K=COLUMNS), decoded)
    # and at a ragged window of its own
    window = reference.evaluate(expr, parts, rows[3:8], cols[:, 17:150], K=COLUMNS)
    assert torch.equal(window, decoded[3:8, 17:150])


def run(source: str, parts: dict[str, torch.Tensor], stored: list[str]) -> torch.Tensor:
    out = torch.full((ROWS, COLUMNS), float("nan"))
    library = build(source, "printed")
    library.decode(*(ctypes.c_void_p(parts[part].data_ptr()) for part in stored), ctypes.c_void_p(out.data_ptr()))
    return out


def decoder(expr: Expr, body: str) -> tuple[str, list[str]]:
    stored = {load.part: load.dtype for load in loads(expr)}
    arguments = ", ".join(f"const {cpp.CTYPES[dtype]}* {part}" for part, dtype in stored.items())
    text = f'{PRELUDE}\nextern "C" void decode({arguments}, float* out) {{\n  const int64_t K = {COLUMNS};\n'
    return f"{text}  for (int64_t n = 0; n < {ROWS}; n++) {{\n{body}  }}\n}}\n", list(stored)


def by_element(expr: Expr) -> str:
    return f"for (int64_t k = 0; k < K; k++) out[n * K + k] = {cpp.scalar(expr)};\n"


def by_vector(expr: Expr) -> str:
    lines = []
    for j in range(4):
        placed = folded(substitute(expr, {k: 64 * c + 16 * j + lane}), {lane: (0, 15)})
        lines.append(f"store(out + n * K + 64 * c + {16 * j}, {cpp.vector(placed, lane, {})});")
    return "for (int64_t c = 0; c < K / 64; c++) {\n" + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize("body", [by_element, by_vector])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_cpp_equals_decode(encoding: Encoding, body: Callable[[Expr], str]) -> None:
    parts, decoded = encoded(encoding)
    expr = encoding.expr((None, K))
    # a product and a sum may be one rounding in C++
    tolerance = 2e-7 * float(decoded.abs().max())
    torch.testing.assert_close(run(*_with(decoder(expr, body(expr)), parts)), decoded, rtol=0, atol=tolerance)


def _with(
    source: tuple[str, list[str]], parts: dict[str, torch.Tensor]
) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    return source[0], parts, source[1]


def test_a_wrong_mask_is_seen() -> None:
    parts, decoded = encoded(Affine(4, 64))
    expr = Affine(4, 64).expr((None, K))
    source, stored = decoder(expr, by_vector(expr))
    assert " & 15)" in source
    wrong = run(source.replace(" & 15)", " & 7)"), parts, stored)
    assert not torch.allclose(wrong, decoded, rtol=0, atol=1e-2)


def test_scattered_loads_are_right_too() -> None:
    expr = Load("data", n * COLUMNS + (COLUMNS - 1 - k), "float32")
    data = torch.randn(ROWS, COLUMNS)
    assert torch.equal(run(*_with(decoder(expr, by_vector(expr)), {"data": data})), data.flip(1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("body", [by_element, by_vector])
def test_every_half_converts_exactly(dtype: str, body: Callable[[Expr], str]) -> None:
    bits = torch.arange(ROWS * COLUMNS, dtype=torch.int32).mul(37).to(torch.int16).view(ROWS, COLUMNS)
    data = bits.view(getattr(torch, dtype))
    bits[0, 1] = -32767  # the smallest subnormal, negative
    data[0, 2:5] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    expr = Dense(dtype).expr((None, K))
    out = run(*_with(decoder(expr, body(expr)), {"data": data}))
    torch.testing.assert_close(out, data.float(), rtol=0, atol=0, equal_nan=True)
    assert (data[0, 1] < 0) and (out[0, 1] < 0)


def test_vector_loads_are_whole_and_scales_are_single() -> None:
    placed = substitute(Affine(4, 64).expr((None, K)), {k: 64 * c + 16 + lane})
    text = cpp.vector(placed, lane, {})
    assert "load<u8x16>(codes + " in text and "{" not in text and "%" not in text
    assert text.count("scale[") == 1


def test_names_replace_parts() -> None:
    expr = Affine(4, 64).expr((None, 64))
    assert "k_codes[" in cpp.scalar(expr, {"codes": "k_codes"})
    assert "k_codes + " in triton.text(expr, {"codes": "k_codes"})


def test_triton_masks_what_a_load_depends_on() -> None:
    text = triton.text(Affine(8, 0).expr((None, K)), row_mask="n < N", column_mask="k < K")
    assert "tl.load(scale + n, mask=(n < N), other=0)" in text
    assert "mask=(n < N) & (k < K)" in text


def test_literals_and_indices_print() -> None:
    assert cpp.scalar(Const(0.1, "float32")) == "0.1f"
    assert cpp.scalar(Index(4 * (k // 16) + sympy.Mod(k, 3))) == "(int32_t)(((4 * (k / 16)) + (k % 3)))"
    with pytest.raises(NotImplementedError, match="an index with"):
        cpp.index(sympy.sqrt(k))


def test_every_generated_line_compiles_without_warning(tmp_path: Path) -> None:
    from smelt.codegen.compiler import find, flags

    expr = Affine(4, 64, zero=True).expr((None, K))
    source, _ = decoder(expr, by_vector(expr) + by_element(expr))
    (tmp_path / "k.cpp").write_text(source)
    result = find().run(tmp_path / "k.cpp", tmp_path / "k.so", (*flags(), "-Wall", "-Wno-unused-function"))
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
