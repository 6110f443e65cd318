"""An encoding that nobody has seen: a table of eight values and codes of 3 bits, written here, fast everywhere.

Codes lie in two planes, 2 bits and 1 bit; a row has a scale. Its expression is all that the printers and templates get.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import sympy
import torch

from smelt.codegen import gemv
from smelt.codegen.gather import gather_kernel
from smelt.codegen.gemv import Gemv, covers
from smelt.codegen.lower import lower
from smelt.codegen.printers import torch as reference
from smelt.codegen.rows import RowKernel
from smelt.ir.encoding.base import Encoding, Parts
from smelt.ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, Take, k, n
from smelt.ir.interpret import interpret
from smelt.ir.weight import Weight
from smelt.runtime.bound import Bound

from ..ir.programs import captured, quantized
from .mutants import mutant
from .triton_checks import compiled, in_the_interpreter, interpreted

TOLERANCE = 1e-7  # of the sum of magnitudes


@dataclass(frozen=True)
class Lookup(Encoding):
    """`table[low + 4 * high] * scale`, with the eight values of `levels` in `dtype`."""

    name: ClassVar[str] = "lookup"
    dtype: str = "float32"
    levels: tuple[float, ...] = (-1.0, -0.5625, -0.296875, -0.09375, 0.09375, 0.296875, 0.5625, 1.0)

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        table = torch.tensor(self.levels, dtype=getattr(torch, self.dtype))
        scale = x.abs().amax(-1)
        codes = (x[..., None] / scale[..., None, None] - table.float()).abs().argmin(-1).to(torch.uint8)
        low, high = (_packed(plane, bits) for plane, bits in ((codes & 3, 2), (codes >> 2, 1)))
        return {"low": low, "high": high, "table": table, "scale": scale}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        codes = _unpacked(parts["low"], 2) + 4 * _unpacked(parts["high"], 1)
        return (parts["table"].float()[codes.long()] * parts["scale"][..., None]).reshape(shape).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        return 3 * sympy.sympify(shape[0] * shape[1]) + 32 * shape[0] + 8 * 8 * getattr(torch, self.dtype).itemsize

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        low, high = _field("low", 2, shape[-1]), _field("high", 1, shape[-1])
        code = Bin("add", low, Bin("mul", high, Const(4, "int32")))
        value: Expr = Take("table", 8, code, self.dtype)
        value = value if self.dtype == "float32" else Cast("float32", value)
        return Bin("mul", value, Load("scale", n, "float32"))

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) == 2 and shape[-1] % 8 == 0 else "rows are packed by 8 columns"


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """A byte holds neighbouring columns, the first in its lowest bits."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8)
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def _unpacked(plane: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8)
    return (plane[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _field(part: str, bits: int, columns: Any) -> Expr:
    fields = 8 // bits
    byte, shift = n * (sympy.sympify(columns) // fields) + k // fields, Index(bits * sympy.Mod(k, fields))
    return Bin("and", Bin("shr", Cast("int32", Load(part, byte, "uint8")), shift), Const((1 << bits) - 1, "int32"))


every_table = pytest.mark.parametrize("encoding", [Lookup(), Lookup("float16")], ids=["float32", "float16"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """Greatest error relative to the sum of |x| times the row's greatest |w|; NaN counts as infinite."""
    size = x.double().abs().sum(-1, keepdim=True) * w.double().abs().amax(-1)
    return float(((y - x.double() @ w.double().t()).abs() / size).nan_to_num(nan=float("inf")).max())


def multiplied(encoding: Lookup, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], w.shape[0]), float("nan"))
    Gemv(encoding).bind(encoding.encode(w), tuple(w.shape))(x, out)
    return out


@every_table
def test_it_is_an_encoding(encoding: Lookup) -> None:
    w = random(63, 256)
    parts = encoding.encode(w)
    stored = sum(8 * part.numel() * part.itemsize for part in parts.values())
    assert stored == encoding.stored_bits((63, 256))
    assert ((encoding.decode(parts, (63, 256)) - w).abs() <= 0.22 * parts["scale"][:, None]).all()


@every_table
def test_the_torch_printer_equals_decode(encoding: Lookup) -> None:
    parts = encoding.encode(random(63, 256))
    rows, columns = torch.arange(63)[:, None], torch.arange(256)[None]
    wanted = encoding.decode(parts, (63, 256))
    assert torch.equal(reference.evaluate(encoding.expr((None, 256)), parts, rows, columns), wanted)
    other = {**parts, "high": parts["low"][:, ::2]}
    assert not torch.equal(reference.evaluate(encoding.expr((None, 256)), other, rows, columns), wanted)


@every_table
@pytest.mark.parametrize("rows", [1, 63, 129])
def test_the_gemv_equals_decode(encoding: Lookup, rows: int) -> None:
    assert covers(encoding, (rows, 256)) is None
    w = random(rows, 256)
    stored = encoding.decode(encoding.encode(w), (rows, 256))
    for m in (1, 3, 9):
        x = random(m, 256, seed=m)
        y = multiplied(encoding, w, x)
        assert off(y, x, stored) < TOLERANCE
        assert torch.equal(multiplied(encoding, w, x[-1:]), y[-1:])


@every_table
@pytest.mark.parametrize(
    ("right", "wrong"), [(" * 4)", " * 2)"), ("& 3)", "& 1)"), ("fma(scale0,", "fma(scale0 * 1.05f,")]
)
def test_a_wrong_kernel_exceeds_the_tolerance(encoding: Lookup, right: str, wrong: str) -> None:
    w, x = random(63, 256), random(3, 256, seed=1)
    stored = encoding.decode(encoding.encode(w), (63, 256))
    with mutant(right, wrong):
        y = multiplied(encoding, w, x)
    assert off(y, x, stored) > 100 * TOLERANCE


def test_without_wide_vectors_the_table_is_read_by_element(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = random(33, 256), random(5, 256, seed=2)
    stored = Lookup().decode(Lookup().encode(w), (33, 256))
    monkeypatch.setenv("SMELT_MARCH", "x86-64-v2")
    assert off(multiplied(Lookup(), w, x), x, stored) < TOLERANCE


@compiled
def test_a_decoder_runs_on_it_with_fused_epilogues() -> None:
    program, encoding = quantized(captured("llama"), Lookup()), Lookup()
    plan = lower(program, fallback=False)
    kernels = {row["kernel"] for row in plan.kernels()}
    assert {f"{gemv.name(encoding)}.add", f"{gemv.name(encoding)}.silu_mul"} < kernels
    inputs = {"tokens": torch.arange(9)[None] * 7, "positions": torch.arange(9)[None]}
    wanted = interpret(program, inputs)["logits"]

    def error() -> float:
        bound = Bound(plan, inputs, None, {})
        bound.run()
        return float((bound.outputs["logits"] - wanted).abs().max() / wanted.abs().max())

    assert error() < 1e-5
    with mutant(" * 4)", " * 2)"):
        assert error() > 1e-3


def test_with_rounded_activations_it_multiplies_floats() -> None:
    """The values are no multiples of an integer: `covers` says so, and lowering takes the other kernel."""
    assert covers(Lookup(), (8, 256), 32) == "its values are not multiples of an integer code"


def test_a_table_is_looked_up_by_row() -> None:
    weight = Weight((63, 256), Lookup(), Lookup().encode(random(63, 256)))
    kernel, out = gather_kernel(weight), torch.empty(5, 256)
    assert isinstance(kernel, RowKernel)
    ids = torch.tensor([62, 0, 7, 7, 30])
    kernel.bind({"ids": ids, "weight": weight}, out)()
    assert (out - weight.dense()[ids]).abs().max() <= 1e-6


def test_its_name_tells_what_is_not_the_default() -> None:
    assert gemv.name(Lookup()) == "gemv.lookup" and gemv.name(Lookup("float16")) == "gemv.lookup.float16"


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@interpreted
@needs_triton
@every_table
def test_the_triton_kernels_equal_decode(encoding: Lookup) -> None:
    from smelt.codegen.autotune_triton import Tile
    from smelt.codegen.gemm_triton import TritonProduct
    from smelt.codegen.product_triton import Product

    w = random(33, 256)
    parts, product = encoding.encode(w), TritonProduct(Product(encoding, act="relu"))
    stored = encoding.decode(parts, (33, 256))
    for m in (1, 3, 9):
        x, out, bias = random(m, 256, seed=m), torch.full((m, 33), float("nan")), random(33, seed=5)
        product(parts, x, out, bias=bias, tile=Tile(block_n=16, block_k=64) if m < 5 else None)
        wanted = (x.double() @ stored.double().t() + bias).relu()
        assert (out - wanted).abs().max() < 2e-5 * wanted.abs().max()
    wrong = {**parts, "table": parts["table"].flip(0)}
    product(wrong, x, out, bias=bias)
    assert (out - wanted).abs().max() > 0.1 * wanted.abs().max()


@compiled
@needs_triton
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)
