"""Recipes of the family sample, over 4-bit weights and a compressed cache, through the plain meaning of every op."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import smelt
from smelt.ir.errors import SmeltError
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.passes.events import ignore
from smelt.passes.manager import run
from smelt.recipes import load

from .. import tiny

PROMPTS = [tiny.tokens(40), tiny.tokens(24)[:50]]
ASKED = {"max_new_tokens": 12, "eos": ()}


@cache
def base() -> Compiled:
    """4-bit weights and a cache of 8 bits, with a drafter."""
    keys = {"affine": {"bits": 8, "axis": "channel", "group": 8, "zero": True}}
    steps = [
        {"weights.quantize": {"bits": 4}},
        {"cache.insert": {"dtype": "float16"}},
        {"cache.encode": {"keys": keys, "values": {"affine": {"bits": 8, "group": 16}}, "tail": 8, "page": 8}},
        {"decode.lookup": {"tokens": 3}},
    ]
    recipe = {"name": "compressed", "family": "deploy", "does": "Composes.", "steps": steps}
    return smelt.compile(tiny.model(), recipe, target="torch")


def compiled(name: str, *overrides: str) -> Compiled:
    """What a recipe adds to inserting a cache, added to that; searches in the place of the drafter."""
    under, program = base(), base().program.fork()
    steps = [step for step in load(name, catalogue(), overrides).steps if step.name != "cache.insert"]
    if name != "typical":
        program.decode = None
    program.facts["token_breaks"] = under.tokenizer.breaks()
    return Compiled(run(program, steps, None, ignore, None).program, {}, under.assets, "torch")


def tokens(lm: Compiled, **options: Any) -> list[list[int]]:
    return [row.tokens for row in lm.complete(PROMPTS, **ASKED, **options).rows]


def test_a_preset_holds_where_a_call_says_nothing_and_drafts_go_along(tmp_path: Path) -> None:
    lm = compiled("typical", "sample.preset.typical_p=0.5")
    made = tokens(lm, seed=3)
    assert made == tokens(base(), seed=3, temperature=1.0, typical_p=0.5) == tokens(lm, seed=3, speculate=False)
    plain = tokens(base(), seed=3, temperature=1.0)
    assert tokens(lm, seed=3, typical_p=1.0) == plain != made
    assert tokens(lm, temperature=0.0) == tokens(base())
    lm.save(tmp_path / "out")
    assert tokens(smelt.load(tmp_path / "out", "torch"), seed=3) == made


def test_contrastive_search_over_a_compressed_cache() -> None:
    free = compiled("contrastive-search", "sample.contrastive.alpha=0")
    greedy = tokens(base())
    assert tokens(free) == greedy
    lm = compiled("contrastive-search")
    made = lm.complete(PROMPTS, **ASKED)
    assert [row.tokens for row in made.rows] != greedy
    assert made.tokens_per_step == len(PROMPTS)
    assert "".join(lm.stream(PROMPTS[0], **ASKED)) == made.rows[0].text
    with pytest.raises(SmeltError, match="the states of a prefix were not kept: give the prompt as a whole"):
        lm.complete([PROMPTS[1]], prefix=lm.read(PROMPTS[0]), **ASKED)


def test_cautious_search_over_a_compressed_cache() -> None:
    one = compiled("cautious-next-token", "sample.cautious.most=1")
    assert tokens(one, seed=5) == tokens(base(), temperature=0.8, top_p=0.95, seed=5)
    lm = compiled("cautious-next-token", "sample.cautious.most=4", "sample.cautious.length=4")
    assert tokens(lm, seed=5) == tokens(lm, seed=5) != tokens(one, seed=5)
    with pytest.raises(SmeltError, match="cannot follow a grammar"):
        lm.complete(PROMPTS, regex="[0-9]+", **ASKED)
