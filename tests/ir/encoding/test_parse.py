"""Specs: the printed form and the recipe form both read back equal, and mistakes name the nearest right word."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.encoding import Affine, Dense, Encoding, catalogue, parse
from smelt.ir.errors import SmeltError

encodings = st.one_of(
    st.builds(Dense, st.sampled_from(["float32", "float16", "bfloat16", "int64", "bool"])),
    st.builds(
        Affine,
        st.sampled_from([2, 3, 4, 8]),
        st.sampled_from([16, 32, 64, 128]),
        st.sampled_from(["token", "channel"]),
        st.booleans(),
        st.sampled_from(["float16", "bfloat16", "float32"]),
    ),
)


@given(encodings)
def test_what_prints_reads_back_equal(encoding: Encoding) -> None:
    assert parse(str(encoding)) == encoding == parse(encoding.spec())


def test_the_recipe_form_fills_in_defaults() -> None:
    assert parse({"affine": {"bits": 4, "axis": "channel", "group": 64}}) == Affine(4, 64, "channel")
    assert parse({"dense": "float16"}) == Dense("float16") == parse("dense(float16)")
    assert parse("affine(bits=4, group=64)") == Affine(4, 64)


def test_the_catalogue_holds_every_class_by_its_name() -> None:
    known = catalogue()
    assert known["affine"] is Affine and known["dense"] is Dense
    assert all(kind.name == name for name, kind in known.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"afine": {"bits": 4, "group": 64}}, "unknown encoding 'afine' .did you mean 'affine'"),
        ({"affine": {"bits": 4, "grup": 64}}, "unknown option 'grup' .did you mean 'group'"),
        ({"affine": {"bits": 4}}, "the option 'group' is missing"),
        ({"affine": {"bits": 4, "group": 64, "axis": "row"}}, "axis must be token or channel"),
        ({"affine": {"bits": 4, "group": 64}, "dense": "float16"}, "one name with its options"),
        ({}, "one name with its options"),
        ("affine(bits=4, group=", "cannot read the encoding"),
        ("affine(bits=__import__('os').getpid(), group=1)", "cannot read the encoding"),
        ("affine", "the option 'bits' is missing"),
    ],
)
def test_mistakes_name_the_way_out(spec: Any, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        parse(spec)
