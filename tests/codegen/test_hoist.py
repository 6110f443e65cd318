"""What leaves the inner loop: the group, the terms, and that their sum is still the expression."""

import pytest
import sympy
import torch

from smelt.codegen.hoist import Term, depends, folded, span, split
from smelt.codegen.printers import torch as reference
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, k, loads, n, substitute

K = sympy.Symbol("K", integer=True, positive=True)
c, i = sympy.symbols("c i", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (Affine(4, 64), 64),
        (Affine(8, 48, zero=True), 48),
        (Affine(2, 128), 128),
        (Affine(4, 0), None),
        (Affine(4, 64, "channel"), None),
        (Dense("float16"), None),
    ],
    ids=str,
)
def test_the_span_is_the_group(encoding: Encoding, expected: int | None) -> None:
    assert span(encoding.expr((None, K))) == expected


def test_a_byte_of_several_columns_is_no_group() -> None:
    byte = Cast("int32", Load("codes", n * (K // 4) + k // 4, "uint8"))
    code = Bin("and", Bin("shr", byte, Index(2 * sympy.Mod(k, 4))), Const(3, "int32"))
    assert span(Cast("float32", code)) is None
    scaled = Bin("mul", Cast("float32", code), Load("scale", n * (K // 32) + k // 32, "float32"))
    assert span(scaled) == 32


def inner_terms(encoding: Encoding, length: int) -> list[Term]:
    placed = folded(substitute(encoding.expr((None, K)), {k: length * c + i}), {i: (0, length - 1)})
    return split(placed, {i})


def parts_of(expr: Expr | None) -> list[str]:
    return [load.part for load in loads(expr)] if expr is not None else []


def test_scale_and_zero_leave_the_loop() -> None:
    (scale, code), (zero, none) = inner_terms(Affine(4, 64, zero=True), 64)
    assert parts_of(scale) == ["scale"] and parts_of(code) == ["codes"]
    assert parts_of(zero) == ["zero"] and none is None


def test_the_offset_of_symmetric_codes_leaves_the_loop() -> None:
    (scale, code), (offset, none) = inner_terms(Affine(4, 64), 64)
    assert parts_of(scale) == ["scale"] and parts_of(code) == ["codes"] and none is None
    assert offset == Bin("mul", scale, Const(-8.0, "float32"))


def test_nothing_leaves_a_dense_loop() -> None:
    assert [(coefficient, parts_of(factor)) for coefficient, factor in inner_terms(Dense("float32"), 64)] == [
        (Const(1.0, "float32"), ["data"])
    ]


def test_constants_gather_in_one_last_term() -> None:
    x, a, b = (Load(name, at, "float32") for name, at in (("x", i), ("a", n), ("b", n)))
    assert split(Bin("add", a, Bin("sub", x, b)), {i}) == [
        (Const(1.0, "float32"), x),
        (Bin("add", a, Bin("mul", Const(-1.0, "float32"), b)), None),
    ]


@pytest.mark.parametrize(
    "encoding",
    [Affine(4, 64), Affine(8, 32, zero=True), Affine(2, 64, "channel", zero=True), Dense("bfloat16")],
    ids=str,
)
def test_the_terms_sum_to_the_expression(encoding: Encoding) -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    parts = encoding.encode(x)
    rows, cols = torch.arange(64)[:, None], torch.arange(128)[None, :]
    total = torch.zeros(64, 128)
    for coefficient, factor in split(encoding.expr((None, 128)), {i}) + split(encoding.expr((None, 128)), {k}):
        term = reference.evaluate(coefficient, parts, rows, cols)
        total += term if factor is None else term * reference.evaluate(factor, parts, rows, cols)
    torch.testing.assert_close(total, 2 * encoding.decode(parts, (64, 128)), rtol=1e-5, atol=1e-5)


def test_dependence_is_by_symbol() -> None:
    tree = Cast("float32", Index(n + c))
    assert depends(tree, {c}) and not depends(tree, {k})
