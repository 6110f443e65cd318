"""Index arithmetic: folding removes what the ranges decide and never changes a value."""

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from smelt.codegen.ranges import across, bounds, fold

K = sympy.Symbol("K", integer=True, positive=True)
c, lane = sympy.symbols("c lane", integer=True, nonnegative=True)


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
