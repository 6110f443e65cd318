"""Tile expressions are typed strictly and substitute everywhere at once."""

import pytest
import sympy

from smelt.ir.encoding import Affine, LowRank, Sparse, Sum
from smelt.ir.encoding.expr import (
    Bin,
    Cast,
    Const,
    Index,
    Load,
    Scatter,
    Take,
    indices,
    k,
    loads,
    n,
    renamed,
    slot,
    stored,
    substitute,
)


def test_mixed_types_are_refused() -> None:
    with pytest.raises(TypeError, match="write the conversion out"):
        Bin("add", Const(1, "int32"), Const(1.0, "float32"))
    with pytest.raises(TypeError, match="takes int32"):
        Bin("and", Const(1.0, "float32"), Const(1.0, "float32"))


def test_the_type_of_a_tree_is_that_of_its_root() -> None:
    assert Affine(4, 64).expr((8, 64)).dtype == "float32"
    assert Bin("sub", Index(k), Const(1, "int32")).dtype == "int32"


def test_substitution_reaches_every_index_and_is_simultaneous() -> None:
    tree = Bin("mul", Cast("float32", Index(k)), Load("data", n * 64 + k, "float32"))
    swapped = substitute(tree, {n: k, k: n})
    assert list(indices(swapped)) == [n, k * 64 + n]


def test_loads_name_the_parts() -> None:
    tree = Affine(4, 64, zero=True).expr((8, sympy.Symbol("K", integer=True, positive=True)))
    assert [load.part for load in loads(tree)] == ["codes", "scale", "zero"]


def test_a_list_substitutes_its_place_and_keeps_its_slot() -> None:
    tree = Scatter(Load("index", 3 * n + slot, "int32"), Load("value", 3 * n + slot, "float32"), 3)
    moved = substitute(tree, {k: 16 * k + 1, n: n + 5})
    assert isinstance(moved, Scatter) and moved.place == 16 * k + 1
    assert [(a.index, b.index) for a, b in moved.entries] == [(3 * n + 15 + j, 3 * n + 15 + j) for j in range(3)]
    assert [load.part for load in loads(tree)] == ["index", "value"] * 3 and set(indices(tree)) == {
        k, 3 * n, 3 * n + 1, 3 * n + 2
    }  # fmt: skip
    with pytest.raises(TypeError, match="a place is an int32"):
        Scatter(Load("index", slot, "uint8"), Load("value", slot, "float32"), 3)


def test_a_term_is_renamed_wherever_it_names_a_part() -> None:
    tree = Bin(
        "mul", Take("table", 4, Cast("int32", Load("codes", k, "uint8")), "float32"), Load("scale", n, "float32")
    )
    assert stored(renamed(tree, "a_")) == {"a_codes": "uint8", "a_table": "float32", "a_scale": "float32"}
    whole = Sum((Affine(4, 64), LowRank(1), Sparse(2))).expr((8, 64))
    assert list(stored(whole)) == ["a_codes", "a_scale", "b_left", "b_right", "c_index", "c_value"]
