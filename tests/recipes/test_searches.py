"""Recipes that search, over 4-bit weights and a cache of 8 bits: without their options they are greedy decoding."""

from __future__ import annotations

from typing import Any

import pytest

from smelt.ir.choice import Against, Beam, Cascade, Rerank
from smelt.passes import catalogue
from smelt.recipes import load

from .test_sample import ASKED, PROMPTS, base, compiled, tokens

OFF = {
    "adadec": ("sample.rerank.threshold=99",),
    "diverse-beam": ("sample.beam.beams=1", "sample.beam.groups=1"),
    "uscd": ("sample.against.weight=0",),
    "instructive-decoding": ("sample.against.weight=0",),
    "model-cascade": ("decode.skip.layers=[1]", "sample.cascade.threshold=1"),
}


@pytest.mark.parametrize("name", OFF)
def test_without_their_options_recipes_are_greedy(name: str) -> None:
    assert tokens(compiled(name, *OFF[name])) == tokens(base())


ON: dict[str, tuple[Any, tuple[str, ...]]] = {
    "adadec": (Rerank(0.0, 3, 5), ("sample.rerank.threshold=0",)),
    "diverse-beam": (Beam(2, 3, 0.5), ()),
    "uscd": (Against(0.5, True, 0.1, 0.5, 32), ()),
    "instructive-decoding": (Against(0.3, keep=16), ()),
    "model-cascade": (Cascade(-99.0, 0.1), ("decode.skip.layers=[1]", "sample.cascade.threshold=-99")),
}


@pytest.mark.parametrize("name", ON)
def test_recipes_choose_otherwise_and_the_same_again(name: str) -> None:
    search, overrides = ON[name]
    lm = compiled(name, *overrides)
    assert lm.program.choice is not None and lm.program.choice.search == search
    assert tokens(lm) == tokens(lm) != tokens(base())
    made = lm.complete(PROMPTS, **ASKED)
    assert [len(row.others) for row in made.rows] == [5 * (name == "diverse-beam")] * 2


def test_adadec_needs_text_unless_it_is_told_the_threshold() -> None:
    assert load("adadec", catalogue()).needs.calibration == "text"
