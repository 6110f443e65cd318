"""The JSON schema for editors: up to date, valid, and of one mind with the loader."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import pytest

from smelt.ir.errors import SmeltError
from smelt.recipes import json_schema, load
from smelt.recipes.editor import FILE, documented, to_text

Catalogue = Mapping[str, type]


def test_the_file_is_up_to_date() -> None:
    from smelt.passes import catalogue

    written = files("smelt.recipes").joinpath(FILE).read_text(encoding="utf-8")
    assert written == to_text(json_schema(catalogue())), "write it anew: python -m smelt.recipes"


def test_tells_types_defaults_and_docs(catalogue: Catalogue) -> None:
    step = json_schema(catalogue)["properties"]["steps"]["items"]["anyOf"][0]["properties"]["weights.quantize"]
    assert step["description"] == "Stores weights in fewer bits."
    assert step["properties"]["bits"] == {"type": "integer", "description": "codes are this wide."}
    assert step["properties"]["group"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "description": "values that share a scale, along the inner axis.",
        "default": 64,
    }
    assert step["properties"]["scheme"]["enum"] == ["rtn", "gptq"]
    assert step["properties"]["scheme"]["description"] == "how scales are found."
    assert step["required"] == ["bits"]
    assert {"optional", "gate", "name"} < set(step["properties"])


def test_does_not_depend_on_the_order_of_passes(catalogue: Catalogue) -> None:
    assert to_text(json_schema(dict(reversed(list(catalogue.items()))))) == to_text(json_schema(catalogue))


def test_prose_that_looks_like_a_field_ends_a_field(catalogue: Catalogue) -> None:
    class Doc:
        """One.

        first: of
            two lines
        second: alone

        Deviation: none.
        """

    assert documented(Doc) == {"first": "of two lines", "second": "alone", "Deviation": "none."}


def test_what_is_inherited_is_told_where_it_comes_from() -> None:
    class Base:
        """One.

        first: of the base.
        second: of the base.
        """

    class Own(Base):
        """Two.

        second: its own.
        """

    assert documented(Own) == {"first": "of the base.", "second": "its own."}


GOOD: list[Any] = [
    "cache.insert",
    {"cache.insert": None},
    {"weights.quantize": {"bits": 4, "group": None, "scheme": "gptq", "damping": 1, "layers": [1], "name": "a"}},
    {"cache.encode": {"last": {"size": 4}, "values": {"dense": "float16"}, "gate": {"max_kl": 1, "otherwise": "stop"}}},
    {"cache.encode": {"last": None, "values": "dense(float16)", "optional": True}},
]
BAD: list[Any] = [
    4,
    "weights.quantize",
    "cache.insrt",
    {},
    {"cache.insert": 4},
    {"cache.insert": None, "cache.encode": None},
    {"weights.quantize": None},
    {"weights.quantize": {"bits": "4"}},
    {"weights.quantize": {"bits": 4, "grup": 1}},
    {"weights.quantize": {"bits": 4, "scheme": "rtm"}},
    {"weights.quantize": {"bits": 4, "name": "A"}},
    {"cache.encode": {"last": {"size": 4, "rol": True}}},
    {"cache.encode": {"values": 4}},
    {"cache.encode": {"values": {"afine": {"bits": 4, "group": 32}}}},
    {"cache.encode": {"values": {"dense": "float16", "affine": {"bits": 4, "group": 32}}}},
    {"cache.encode": {"gate": {"otherwise": "wait"}}},
]


def verdicts(recipe: dict[str, Any], catalogue: Catalogue) -> tuple[bool, bool]:
    """Whether the schema and the loader accept a recipe."""
    jsonschema = pytest.importorskip("jsonschema", reason="checks the schema by a validator of its own")
    schema = json_schema(catalogue)
    jsonschema.Draft202012Validator.check_schema(schema)
    try:
        load(recipe, catalogue)
    except SmeltError:
        return jsonschema.Draft202012Validator(schema).is_valid(recipe), False
    return jsonschema.Draft202012Validator(schema).is_valid(recipe), True


@pytest.mark.parametrize("step", [*GOOD, *BAD], ids=json.dumps)
def test_agrees_with_the_loader_on_steps(step: Any, catalogue: Catalogue) -> None:
    both = verdicts({"name": "r", "family": "cache", "does": "x", "steps": [step]}, catalogue)
    assert both == ((step in GOOD),) * 2


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"paper": {"title": "T", "year": 2024, "url": "u"}, "expect": {"kl": {"at_most": 1}}}, True),
        ({"paper": {"title": "T", "year": "2024", "url": "u"}}, False),
        ({"family": "caches"}, False),
        ({"need": {}}, False),
        ({"needs": {"calibration": "images"}}, False),
        ({"expect": {"kl": 1}}, False),
        ({"expect": {"kl": {"atmost": 1}}}, False),
        ({"deviations": "none"}, False),
        ({"steps": {}}, False),
    ],
)
def test_agrees_with_the_loader_on_the_header(change: dict[str, Any], good: bool, catalogue: Catalogue) -> None:
    recipe = {"name": "r", "family": "cache", "does": "x", "steps": [], **change}
    assert verdicts(recipe, catalogue) == (good, good)
