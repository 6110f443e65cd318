"""What leaves the inner loop: the group, the terms, and that their sum is still the expression."""

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.codegen.hoist import Term, depends, folded, span, split
from smelt.codegen.printers import torch as reference
from smelt.codegen.ranges import across, bounds, fold
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, k, loads, n, substitute

K = sympy.Symbol("K", integer=True, positive=True)
c, i, lane = sympy.symbols("c i lane", integer=True, nonnegative=True)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (sympy.floor((64 * c + 16 + lane) / 32), 2 * c),
        (sympy.floor((32 * c + 16 + lane) / 64), sympy.floor(c / 2)),
        (sympy.Mod(64 * c + 48 + lane, 16), lane),
        (sympy.Mod(32 * c + lane, 64), 32 * sympy.Mod(c, 2) + lane),
        (4 * sympy.floor(sympy.Mod(32 * c + 16 + lane, 32) / 16), sympy.Integer(4)),
        (sympy.floor((16 * c + lane) / 24), sympy.floor((16 * c + lane) / 24)),
    ],
)
def test_divisions_vanish_where_the_range_allows(index: sympy.Expr, expected: sympy.Expr) -> None:
    got = fold(index, {lane: (0, 15)})
    for at in ({c: 0, lane: 0}, {c: 3, lane: 7}, {c: 10, lane: 15}):
        assert got.subs(at) == index.subs(at)
    if expected != index:
        assert sympy.simplify(got - expected) == 0


@given(
    st.integers(1, 96),
    st.integers(0, 200),
    st.integers(1, 96),
    st.integers(0, 50),
    st.integers(0, 15),
    st.sampled_from([sympy.floor, sympy.Mod]),
)
def test_folding_never_changes_a_value(factor: int, offset: int, d: int, at_c: int, at_lane: int, kind: object) -> None:
    inner = factor * c + offset + lane
    index = sympy.floor(inner / d) if kind is sympy.floor else sympy.Mod(inner, d)
    values = {c: at_c, lane: at_lane}
    got = fold(index, {lane: (0, 15)})
    assert got.subs(values) == index.subs(values)
    low, high = bounds(got, {lane: (0, 15), c: (0, 50)})
    assert low <= got.subs(values) <= high


def test_lanes_are_told_apart() -> None:
    assert across(c + 3, lane) == "uniform"
    assert across(c * K + lane, lane) == "contiguous"
    assert across(2 * lane, lane) == across(sympy.floor(lane / 3), lane) == across(c - lane, lane) == "scattered"


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
