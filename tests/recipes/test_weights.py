"""Every recipe of weights: kernels mean what the interpreter does, bytes shrink, cache and drafts stand on it."""

from __future__ import annotations

import functools
import statistics
import tempfile
from pathlib import Path

import pytest
import torch

from smelt.assets import Assets
from smelt.ir.capture.hf import capture_hf
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.model import Compiled
from smelt.passes import Samples, catalogue
from smelt.passes.manager import run
from smelt.recipes import load
from smelt.recipes.loader import shipped
from smelt.runtime.session import Session

VOCABULARY, PROMPT, NEW = 128, 200, 24
SHORT = ["steps=3", "batch=2", "length=64", "checks=1"]  # of a training
# recipes whose promise is not fewer bytes, or not of a model with so few tokens
SAME_BYTES = {"distil", "subspace-embedding", "masking"}


@functools.cache
def _source() -> Program:
    """A random llama of two layers, two KV heads of 64, float16 weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # as they are initialised, logits would be flat
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.08
    with tempfile.TemporaryDirectory(prefix="smelt-recipes-") as folder:
        model.to(torch.float16).save_pretrained(folder)
        program = _loaded(Path(folder))
    program.base = program.fork()
    for name, weight in program.weights.items():  # from which it differs by a thin product
        if (value := weight.dense()).dim() == 2:
            program.base.weights[name] = Weight.of((value + value[:, :1] @ value[:1]).half())
    return program


def _loaded(folder: Path) -> Program:
    program = capture_hf(folder)
    for name, weight in program.weights.items():  # out of files that go
        program.weights[name] = type(weight)(weight.shape, weight.encoding, dict(weight.parts))
    return program


def _tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    """Half of each row is said twice, so that a drafter finds something."""
    half = torch.randint(VOCABULARY, (rows, length // 2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], 1)


def named(*families: str) -> list[str]:
    """The recipes of some families, but for those of models that read images."""
    return [header.name for header in shipped() if header.family in families and not header.needs.images]


@pytest.mark.parametrize("name", named("weights"))
def test_a_recipe(name: str) -> None:
    """One test a recipe, so that two processes do not compile it twice."""
    check(name)


def check(name: str) -> None:
    """A recipe under KIVI's cache and a tree of drafts."""
    found = load(name, catalogue())
    changes = [f"{step.name}.{each}" for step in found.steps if hasattr(step.pass_, "checks") for each in SHORT]
    searches = [step.name for step in found.steps if hasattr(step.pass_, "generations")]
    changes += [f"{search}.{each}" for search in searches for each in ("generations=1", "offspring=2")]
    steps = [step for step in load(name, catalogue(), changes).steps if step.name != "cache.insert"]
    source = _source().fork()
    if name != "ere":
        source.base = None
    made = run(source, steps, Samples(_tokens(24, 64, 0))).program
    assert made.nbytes < 0.9 * source.nbytes or name in SAME_BYTES
    assert made.nbytes == sum(weight.bits for weight in made.weights.values()) / 8
    over = [*load("kivi", catalogue()).steps, *load("token-recycling", catalogue()).steps[1:]]
    lm = Compiled(run(made, over, Samples(_tokens(24, 64, 0))).program, {}, Assets())
    _kernels_mean_what_is_meant(lm)
    _drafts_change_no_token(lm)


def _kernels_mean_what_is_meant(lm: Compiled) -> None:
    """Of most steps: an activation within 4e-6 of a tie is rounded the other way, and moves logits by 1e-2."""
    errors = []
    session = Session(lm.plan, 1, 512)
    session.prefill([_tokens(1, PROMPT, 1)[0].tolist()])
    for token in _tokens(1, 4, 2)[0].tolist():
        tokens, positions = torch.tensor([[token]]), torch.tensor(session.cache.lengths)[:, None]
        got = session.step(tokens, positions)["logits"].clone()
        session.cache.begin(positions)
        meant = interpret(lm.program, {"tokens": tokens, "positions": positions}, session.cache)["logits"]
        errors.append(float((got - meant).abs().max() / meant.abs().max()))
        assert (got - meant.roll(1, -1)).abs().max() / meant.abs().max() > 1e-1
        session.cache.commit([[0]])
    assert statistics.median(errors) < 2e-3


def _drafts_change_no_token(lm: Compiled) -> None:
    prompts = [_tokens(1, PROMPT, 3)[0].tolist()]
    for request in ({}, {"temperature": 1.0, "seed": 3}):
        drafted = lm.complete(prompts, max_new_tokens=NEW, **request, speculate="always")
        plain = lm.complete(prompts, max_new_tokens=NEW, **request, speculate=False)
        assert [row.tokens for row in drafted.rows] == [row.tokens for row in plain.rows]
