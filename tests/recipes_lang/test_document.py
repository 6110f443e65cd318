"""YAML as recipes read it: version 1.2 scalars, plain data only, bounded work, and text that reads back equal."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.errors import SmeltError
from smelt.recipes.document import MAX_DEPTH, dump, parse

SCALARS: dict[str, Any] = {
    "on": "on",
    "yes": "yes",
    "true": True,
    "1e-3": 1e-3,
    "1_000": "1_000",
    "010": 10,
    "0x1F": 31,
    "0o17": 15,
    "12:30": "12:30",
    "2024-01-01": "2024-01-01",
    "-.inf": -math.inf,
    ".5": 0.5,
    "4.": 4.0,
    "~": None,
    "Null": None,
    "NO": "NO",
    '"4"': "4",
    "!!str 4": "4",
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_follow_yaml_1_2(text: str) -> None:
    value = parse(f"on: {text}", "t").plain()["on"]
    assert (value, type(value)) == (SCALARS[text], type(SCALARS[text]))


REFUSED = {
    "python object": ("a: !!python/object/apply:os.system [ls]", "t:1:4: tag 'python/object/apply:os.system' is not "),
    "own tag": ("a: !secret x", "t:1:4: tag '!secret' is not allowed; a recipe holds plain data"),
    "binary": ("a: !!binary aGk=", "t:1:4: tag 'binary' is not allowed; a recipe holds plain data"),
    "tag that does not fit": ("a: !!int four", "t:1:4: not a value of type int: 'four'"),
    "number without end": ("a: " + "9" * 5000, "t:1:4: not a value of type int: '" + "9" * 40 + "'"),
    "merge key": ("b: &b {x: 1}\na: {<<: *b}", "t:2:5: merge keys (<<) are not supported; write the keys out"),
    "key of many parts": ("[a]: 1", "t:1:1: a key must be a word, not a list or mapping"),
    "control character": ("a: 1\nbc: \x07", "t:2:5: not valid YAML: character 0x7 is not allowed"),
    "half a surrogate pair": (r'a: "\ud800"', "t:1:4: not a value of type str: '\\ud800'"),
    "no such character": (r'a: "\UFFFFFFFF"', "t:1:1: not valid YAML: an escape names no character"),
    "unknown alias": ("a: *b", "t:1:4: not valid YAML: found undefined alias 'b'"),
    "alias within itself": ("a: &a [*a]", "t:1:4: nested deeper than 40, or an alias that contains itself"),
    "deep": ("a: " + "[" * 500_000, "t:1:42: not valid YAML: nested deeper than 40"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(SmeltError) as caught:
        parse(text, "t")
    assert str(caught.value).startswith(message)


def test_aliases_are_read_but_do_not_explode() -> None:
    assert parse("a: &x {b: [1]}\nc: *x", "t").plain() == {"a": {"b": [1]}, "c": {"b": [1]}}
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    with pytest.raises(SmeltError, match="more than 20000 parts once aliases are expanded"):
        parse(bomb, "t")


def test_depth_is_allowed_up_to_the_bound() -> None:
    parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "t")
    with pytest.raises(SmeltError, match="nested deeper"):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "t")


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from([*SCALARS, "<", "é", "#"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
data = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4))


@given(data.filter(lambda value: value is not None))
def test_what_is_written_reads_back_equal(value: Any) -> None:
    back = parse(dump(value), "t").plain()
    assert back == value and repr(back) == repr(value)


@given(st.text(max_size=60) | st.text("[]{}:,-&*a!|>'\"\\ \n\t#%@`?<1.", max_size=60))
def test_any_text_is_data_or_one_error(text: str) -> None:
    try:
        parse(text, "t")
    except SmeltError as error:
        assert str(error).startswith("t:")
