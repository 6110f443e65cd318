"""Which recipes take part: all that ship for caches, files, options behind colons, and a few plain ones by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smelt.passes import catalogue
from smelt.recipes import Recipe, load, shipped

FAMILIES = ("cache", "attention")
INSERT = {"cache.insert": {"dtype": "float16"}}


def _affine(bits: int, axis: str) -> dict[str, Any]:
    return {"affine": {"bits": bits, "axis": axis, "group": 32, "zero": True}}


def _encoded(bits: int, keys: str) -> list[dict[str, Any]]:
    return [INSERT, {"cache.encode": {"keys": _affine(bits, keys), "values": _affine(bits, "token")}}]


def _selected(score: str, keep: float) -> list[dict[str, Any]]:
    return [INSERT, {"cache.select": {"score": score, "keep": keep, "skip_layers": []}}]


PLAIN: dict[str, list[dict[str, Any]]] = {
    "float16": [INSERT],
    "int8": _encoded(8, "channel"),
    "int4": _encoded(4, "channel"),  # as in KIVI: keys per channel, values per token
    "int4-token": _encoded(4, "token"),
    "int2": _encoded(2, "channel"),
    "int2-token": _encoded(2, "token"),
    "newest-50": _selected("recency", 0.5),
    "low-norm-50": _selected("key_norm", 0.5),
}


def default() -> list[str]:
    """`none`, the plain ones, and every shipped recipe of a family of caches."""
    return ["none", *PLAIN, *(header.name for header in shipped() if header.family in FAMILIES)]


def resolve(names: Sequence[str]) -> dict[str, Recipe]:
    """Recipes by name, `none` first; SmeltError for one that is unknown. `name:step.option=value` overrides."""
    out = {}
    for name in dict.fromkeys(["none", *names]):
        source, *overrides = name.split(":")
        plain = PLAIN.get(source)
        what = (
            source if plain is None else {"name": source, "family": "cache", "does": "Stands beside.", "steps": plain}
        )
        out[name] = load(what, catalogue(), overrides)
    return out
