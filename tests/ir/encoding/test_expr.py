"""Tile expressions are typed strictly and substitute everywhere at once."""

import pytest
import sympy

from smelt.ir.encoding import Affine
from smelt.ir.encoding.expr import Bin, Cast, Const, Index, Load, indices, k, loads, n, substitute


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
