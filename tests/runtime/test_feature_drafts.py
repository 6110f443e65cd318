"""Drafts from features: no token changes, and every draft is what the layer says of the right features."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.verify import verify
from smelt.passes.decode.draft import Draft
from smelt.passes.decode.feature import Feature
from smelt.passes.decode.skip import Skip
from smelt.runtime import artefact
from smelt.runtime.drafters import feature
from smelt.runtime.drafters.base import Drafted
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured

NEW = 16
PROMPTS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (3, 1, 17)
]
SAMPLINGS = [Sampling(), Sampling(temperature=1.2, seed=2), Sampling(temperature=0.9, repetition_penalty=1.3)]


def drafting(family: str = "llama", **options: Any) -> Program:
    """Weights of the draft are random, so that no mistake hides behind a zero."""
    program = cached(captured(family), dense="float32")
    Feature(dtype="float32").apply(program, None)
    Draft(**options).apply(program, None)
    assert program.draft is not None
    random = torch.Generator().manual_seed(1)
    for name in ("feature.projection.token", "feature.projection.feature"):
        data = program.draft.weights[name].parts["data"]
        data.copy_(torch.randn(data.shape, generator=random) / 8)
    verify(program)
    return program


@cache
def plan(family: str = "llama") -> Plan:
    return lower(drafting(family, width=3, depth=3))


def decoded(plan: Plan, sampling: Sampling, speculate: bool = True, prompts: Any = PROMPTS) -> Decoding:
    session = Session(plan, len(prompts), max(map(len, prompts)) + NEW - 1)
    made = Decoding(session, prompts, sampling, Limits(NEW), speculate)
    for _ in made.run():
        pass
    return made


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_token_changes(family: str) -> None:
    for sampling in SAMPLINGS if family == "llama" else SAMPLINGS[-1:]:
        assert tokens(decoded(plan(family), sampling)) == tokens(decoded(plan(family), sampling, speculate=False))


def chain(program: Program, text: list[int], depth: int) -> list[int]:
    """What the layer drafts behind a text, without any cache."""
    assert program.draft is not None
    ids = torch.tensor([text])
    known = interpret(program, {"tokens": ids, "positions": torch.arange(len(text))[None]})["features"][:, :-1]
    for _ in range(depth):
        ahead = ids[:, 1:]
        inputs = {"tokens": ahead, "positions": torch.arange(ahead.shape[1])[None], "features": known}
        out = interpret(program.draft, inputs)
        ids = torch.cat([ids, out["logits"][:, -1:].argmax(-1)], 1)
        known = torch.cat([known, out["features"][:, -1:]], 1)
    return ids[0, len(text) :].tolist()


def drafts(program: Program, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """(text, draft) of every step and row of a greedy generation."""
    seen: list[tuple[list[int], list[int]]] = []
    propose = feature.FeatureDrafter.propose_all

    def told(self: feature.FeatureDrafter, rows: Any) -> dict[int, Drafted]:
        made = propose(self, rows)
        seen.extend((list(self.tokens[row]), made[row].tokens[1:]) for row in rows)
        return made

    monkeypatch.setattr(feature.FeatureDrafter, "propose_all", told)
    decoded(lower(program), Sampling())
    return seen


def test_drafts_are_those_of_the_layer_over_the_models_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature, "CHUNK", 8)  # the longest prompt takes three reads
    program = drafting(depth=3)
    seen = drafts(program, monkeypatch)
    assert len(seen) > 20
    assert all(draft == chain(program, text, 3) for text, draft in seen)


def test_features_of_the_wrong_tokens_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = feature.FeatureDrafter.observe

    def late(self: feature.FeatureDrafter, row: int, verified: Any) -> None:
        observe(self, row, verified)
        self._unread[row] = self._unread[row].roll(1, -1)

    monkeypatch.setattr(feature.FeatureDrafter, "observe", late)
    program = drafting(depth=3)
    assert any(draft != chain(program, text, 3) for text, draft in drafts(program, monkeypatch))


def test_an_artefact_holds_the_layer_and_shares_the_rest(tmp_path: Path) -> None:
    program = plan().program
    artefact.save(tmp_path / "out", program, {}, {})
    loaded, manifest = artefact.load(tmp_path / "out")
    assert same_program(program, loaded) is None
    assert program.draft is not None and loaded.draft is not None
    assert {name for name, entry in manifest["draft"].items() if "of" not in entry} == set(program.draft.facts["own"])
    assert tokens(decoded(lower(loaded), SAMPLINGS[1])) == tokens(decoded(plan(), SAMPLINGS[1]))


def test_what_does_not_fit_is_said() -> None:
    program = cached(captured("llama"), dense="float32")
    Skip(layers=(1,)).apply(program, None)
    assert "llama must not have a draft model yet: keep one of the two steps" in list(Feature().requires(program))
    assert list(Feature().requires(cached(captured("llama"), dense="float32"))) == []
