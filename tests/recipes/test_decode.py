"""Recipes that draft, over 4-bit weights and a compressed cache: no token changes, and less is asked of the model."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import smelt
from smelt.ir.decode import Walk
from smelt.model import Compiled
from smelt.passes import Samples, catalogue
from smelt.passes.events import ignore
from smelt.passes.manager import run
from smelt.recipes import load, shipped
from smelt.texts import held_out_text, training_texts

PROMPTS = [held_out_text()[at : at + 400] for at in (2000, 40000)]
TRAINED = {
    "medusa-heads": "train.heads",
    "blockwise": "train.heads",
    "eagle": "train.feature",
    "flash": "train.feature",
    "ppd": "train.prompts",
    "chimera": "train.fuse",
}
SHORTENED = ("skipdecode", "ffn-skipllm")  # leave blocks out for good
EXACT = [
    header.name
    for header in shipped()
    if header.family == "decode" and header.name not in ("entropy-adaptive", "lantern", *SHORTENED, *TRAINED)
]
SAMPLED = {"max_new_tokens": 32, "eos": (), "temperature": 1.0, "seed": 3}
GREEDY = {"max_new_tokens": 32, "eos": ()}


@cache
def base() -> Compiled:
    """4-bit weights behind KIVI's cache."""
    steps = [{"weights.quantize": {"bits": 4}}, {"include": "kivi"}]
    recipe = {"name": "compressed", "family": "deploy", "does": "Composes.", "steps": steps}
    return smelt.compile(str(smelt.reference_model()), recipe)


def compiled(name: str, *overrides: str) -> Compiled:
    """What a recipe adds to inserting a cache, added to that."""
    under, samples = base(), None
    if name == "aded" or overrides:
        ids = under.tokenizer.encode("".join(training_texts(200_000 if name == "aded" else 40_000)))
        samples = Samples(torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256))
    steps = [step for step in load(name, catalogue(), overrides).steps if step.name != "cache.insert"]
    made = run(under.program, steps, samples, ignore, None)
    return Compiled(made.program, {}, under.assets)


@pytest.mark.parametrize("name", EXACT)
def test_no_token_changes_and_fewer_steps_are_taken(name: str) -> None:
    lm = compiled(name)
    walks = isinstance(lm.program.decode.accept, Walk)  # type: ignore[union-attr]
    for options in (GREEDY, SAMPLED):
        drafted = lm.complete(PROMPTS, **options, speculate="always")
        assert drafted.steps < 31 or options is SAMPLED
        if walks or options is GREEDY:
            plain = lm.complete(PROMPTS, **options, speculate=False)
            assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows], options


@pytest.mark.parametrize(("name", "step"), TRAINED.items())
def test_drafters_that_learned_little_change_no_token(name: str, step: str) -> None:
    lm = compiled(name, f"{step}.steps=2", f"{step}.length=32", f"{step}.checks=1")
    for options in (GREEDY, SAMPLED):
        drafted, plain = (lm.complete(PROMPTS, **options, speculate=speculate) for speculate in (True, False))
        assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows], options


def test_a_trusted_draft_is_no_promise() -> None:
    lm = smelt.compile(str(smelt.reference_model()), "entropy-adaptive")
    assert not lm.program.decode.exact  # type: ignore[union-attr]
    sure = smelt.compile(str(smelt.reference_model()), "entropy-adaptive", overrides=["decode.draft.entropy=1e-9"])
    made, plain = (sure.complete(PROMPTS, **GREEDY, speculate=speculate) for speculate in (True, False))
    assert [row.tokens for row in made.rows] == [row.tokens for row in plain.rows]


def test_another_model_may_draft() -> None:
    small = smelt.compile(
        str(smelt.reference_model()),
        {
            "name": "small",
            "family": "deploy",
            "does": "Drafts.",
            "steps": [{"weights.quantize": {"bits": 4}}, {"cache.insert": {"dtype": "float16"}}],
        },
    )
    steps = [{"cache.insert": {"dtype": "float16"}}, {"decode.draft": {"depth": 3}}]
    recipe = {"name": "drafted", "family": "deploy", "does": "Is drafted for.", "steps": steps}
    lm = smelt.compile(str(smelt.reference_model()), recipe, draft=small)
    for options in (GREEDY, SAMPLED):
        drafted, plain = (lm.complete(PROMPTS, **options, speculate=speculate) for speculate in ("always", False))
        assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows]
        assert drafted.steps < 16
