"""Recipes that read a part of the cache: kernels and reference write the same text, with and without drafts."""

from typing import Any

import pytest
import torch

import smelt
from smelt.model import Compiled

from . import tiny

LITTLE = {"budget": 16, "tail": 16}  # of the 200 tokens of the prompt
RECIPES: dict[str, dict[str, Any]] = {  # for a model of two layers
    "quest": {"dense_layers": 0},
    "tokenselect": {},
    "tidaldecode": {"dense_layers": 0, "layers": [0]},
}
NEW = 24


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return [int(token) for token in torch.randint(4096, (200,), generator=torch.Generator().manual_seed(1))]


def compiled(name: str, target: Any = "cpp", recycle: bool = False) -> Compiled:
    steps: list[Any] = [{"include": name}, *([{"decode.recycle": {"width": 2, "nodes": 3}}] if recycle else [])]
    overrides = [f"cache.retrieve.{key}={value}" for key, value in (LITTLE | RECIPES[name]).items()]
    recipe = {"name": "little", "family": "cache", "does": "x", "steps": steps}
    return smelt.compile(tiny.model(), recipe, overrides=overrides, target=target)


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_and_drafts_read_what_the_reference_reads(name: str, prompt: list[int]) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos": ()}
    mine = compiled(name).generate(prompt, **options)
    assert mine == compiled(name, "torch").generate(prompt, **options)
    assert mine == compiled(name, recycle=True).generate(prompt, **options)
    assert mine != smelt.compile(tiny.model(), "none", target="torch").generate(prompt, **options)


def test_rows_of_a_batch_read_lists_of_their_own(prompt: list[int]) -> None:
    model, rows = compiled("tidaldecode"), [prompt, prompt[100:], prompt[:3]]
    options: dict[str, Any] = {"max_new_tokens": 16, "eos": ()}
    assert model.generate(rows, **options) == [model.generate(row, **options) for row in rows]
