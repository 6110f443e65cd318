"""Every cache recipe over 4-bit weights with a drafter on top: kernels, bytes, and the losslessness of speculation."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.interpret import interpret
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.recipes import load as load_recipe
from smelt.runtime.session import Session

PROMPT, NEW, VOCABULARY = 300, 40, 128
# what makes each recipe do in a prompt of 300 tokens what it does in thousands
SMALLER: dict[str, tuple[str, ...]] = {
    "streaming-llm": ("cache.select.tail=60",),
    "h2o": ("cache.select.budget=64", "cache.select.tail=64"),
    "snapkv": ("cache.select.budget=96",),
    "l2-norm": ("cache.select.budget=128", "cache.select.skip_layers=[0]"),
    "saq": ("cache.tier.hold=64",),
    "ems": ("cache.select.budget=64",),
    "quest": ("cache.retrieve.budget=64",),
    "tokenselect": ("cache.retrieve.budget=64", "cache.retrieve.sink=16", "cache.retrieve.tail=32"),
    "tidaldecode": ("cache.retrieve.budget=64", "cache.retrieve.dense_layers=1", "cache.retrieve.layers=[1,2]"),
    "hyperattention": ("attention.hyper.min_seq_len=128", "attention.hyper.block=64", "attention.hyper.sample=32"),
}


def _names() -> list[str]:
    steps = catalogue()
    found = ((path.stem, load_recipe(path.stem, steps)) for path in sorted(_folder().glob("*.yaml")))
    return [name for name, recipe in found if recipe.family in ("cache", "attention")]


def _folder() -> Path:
    from smelt import recipes

    return Path(str(recipes.__file__)).parent


every_recipe = pytest.mark.parametrize("name", _names())


@functools.cache
def _model() -> Path:
    """A random llama of four layers, two KV heads of 64, context 512."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # as they are initialised, logits would be flat
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.12
    model.save_pretrained(_place().name)
    return Path(_place().name)


@functools.cache
def _place() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="smelt-recipes-")  # kept by the cache until the interpreter ends


def _tokens(count: int, seed: int) -> list[int]:
    """Half of it is said twice, so that a drafter finds something."""
    random = torch.Generator().manual_seed(seed)
    half: list[int] = torch.randint(VOCABULARY, (count // 2,), generator=random).tolist()
    return (half + half)[:count]


PROMPTS = [_tokens(PROMPT, 1), _tokens(PROMPT // 2, 2)]


def _compiled(name: str) -> Compiled:
    recipe: dict[str, Any] = {"name": "tried", "family": "deploy", "does": "Tries a recipe.", "steps": [
        {"weights.quantize": {"bits": 4}}, {"include": name}, {"decode.recycle": {"width": 4, "nodes": 5}},
    ]}  # fmt: skip
    samples = torch.tensor([_tokens(256, seed) for seed in range(10, 18)])
    return smelt.compile(_model(), recipe, calibration=samples, overrides=SMALLER.get(name, ()))


@every_recipe
def test_a_recipe(name: str) -> None:
    """One test a recipe, so that two processes do not compile it twice."""
    lm = _compiled(name)
    _kernels_read_what_is_meant(lm)
    _speculation_changes_no_token(lm)
    _measured_bytes_are_the_formulas(lm)


def _kernels_read_what_is_meant(lm: Compiled) -> None:
    """The same cache, read by both at every step: what is chosen cannot differ by the rounding of a score."""
    session = Session(lm.plan, 2, 512)
    session.prefill(PROMPTS)
    for number, token in enumerate(_tokens(NEW, 3)):
        tokens, positions = torch.full((2, 1), token), torch.tensor(session.cache.lengths)[:, None]
        got = session.step(tokens, positions)["logits"].clone()
        if number % 4 == 0:
            session.cache.begin(positions)
            meant = interpret(lm.program, {"tokens": tokens, "positions": positions}, session.cache)["logits"]
            assert (got - meant).abs().max() / meant.abs().max() < 2e-4
            assert (got - meant.roll(1, -1)).abs().max() / meant.abs().max() > 1e-2
        session.cache.commit([[0], [0]])


def _speculation_changes_no_token(lm: Compiled) -> None:
    for request in ({}, {"temperature": 1.0, "seed": 3}):
        drafted = lm.complete(PROMPTS, max_new_tokens=NEW, **request)
        plain = lm.complete(PROMPTS, max_new_tokens=NEW, speculate=False, **request)
        assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows]


def _measured_bytes_are_the_formulas(lm: Compiled) -> None:
    plan = lm.program.cache
    assert plan is not None
    session = Session(lm.plan, 1, 512)
    session.prefill(PROMPTS[:1])
    used, formula = 8 * session.cache.nbytes().used, int(plan.bits(PROMPT))
    if all(site.estimate is None and (not site.select or site.select.heads == "even") for site in plan.sites):
        assert used == formula
    else:  # the formula tells what is kept at most, each head rounds to pages
        slack = sum(site.kv_heads * int(site.page_bits(0)) for site in plan.sites if site.select or site.estimate)
        assert used <= formula + slack
