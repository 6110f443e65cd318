"""Drafts from features: no token changes, and every draft is what the layer says of the right features."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import ceil
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
from smelt.runtime.sampling import Sampling, choose
from smelt.runtime.session import Session

from ..ir.programs import cached, captured

NEW = 16
PROMPTS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (3, 1, 17)
]
GREEDY = Sampling()
SAMPLINGS = [GREEDY, Sampling(temperature=1.2, seed=2), Sampling(temperature=0.9, repetition_penalty=1.3)]


def drafting(family: str = "llama", ahead: int = 1, **options: Any) -> Program:
    """Weights of the draft are random, so that no mistake hides behind a zero."""
    program = cached(captured(family), dense="float32")
    Feature(dtype="float32", ahead=ahead).apply(program, None)
    Draft(**options).apply(program, None)
    assert program.draft is not None
    random = torch.Generator().manual_seed(1)
    sides = [f"feature.projection.{side}" for side in ("token", "feature")]
    for name in sides + [f"feature.ahead.{j}.bent" for j in range(1, ahead)]:
        data = program.draft.weights[name].parts["data"]
        data.copy_(torch.randn(data.shape, generator=random) / 8)
    verify(program)
    return program


@cache
def plan(family: str = "llama", ahead: int = 1) -> Plan:
    return lower(drafting(family, ahead, width=3, depth=3))


def decoded(plan: Plan, sampling: Sampling, speculate: bool = True, prompts: Any = PROMPTS) -> Decoding:
    session = Session(plan, len(prompts), max(map(len, prompts)) + NEW + 5)  # whole drafts fit behind the last token
    made = Decoding(session, prompts, sampling, Limits(NEW), speculate)
    for _ in made.run():
        pass
    return made


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize(("family", "ahead"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("gpt2", 3)])
def test_no_token_changes(family: str, ahead: int) -> None:
    for sampling in SAMPLINGS if family == "llama" else SAMPLINGS[-1:]:
        made = decoded(plan(family, ahead), sampling)
        assert tokens(made) == tokens(decoded(plan(family, ahead), sampling, speculate=False))


def test_the_first_of_several_states_is_that_of_eagle() -> None:
    one, two = (drafting(ahead=ahead).draft for ahead in (1, 2))
    assert one is not None and two is not None
    ids = torch.tensor([PROMPTS[2]])
    features = torch.randn(*ids.shape, 64, generator=torch.Generator().manual_seed(3))
    inputs = {"tokens": ids, "positions": torch.arange(ids.shape[1])[None], "features": features}
    eagle, flash = interpret(one, inputs), interpret(two, inputs)
    for name in ("features", "logits"):
        assert torch.equal(eagle[name], flash[name][:, :, 0])
        assert not torch.equal(eagle[name], flash[name][:, :, 1])


def chain(program: Program, text: list[int], depth: int, sampling: Sampling = GREEDY, unseen: int = 0) -> list[int]:
    """What the layer drafts behind a text, without any cache, if it sees nothing of the first tokens."""
    assert program.draft is not None
    ids = torch.tensor([text])
    known = interpret(program, {"tokens": ids, "positions": torch.arange(len(text))[None]})["features"][:, unseen:-1]
    while ids.shape[1] < len(text) + depth:
        given = ids[:, unseen + 1 :]
        inputs = {"tokens": given, "positions": torch.arange(given.shape[1])[None], "features": known}
        out = interpret(program.draft, inputs)
        logits = out["logits"][0, -1].view(-1, out["logits"].shape[-1])
        places = ids.shape[1] + torch.arange(len(logits))
        new = choose(sampling.process(logits, None), sampling, torch.zeros_like(places), places)
        ids = torch.cat([ids, new[None]], 1)
        known = torch.cat([known, out["features"][:, -1].view(1, len(logits), -1)], 1)
    return ids[0, len(text) : len(text) + depth].tolist()


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


def counted(name: str, calls: Counter[str]) -> Any:
    """A method of the drafter that counts how often it is called."""
    method = getattr(feature.FeatureDrafter, name)

    def called(self: feature.FeatureDrafter, *given: Any) -> Any:
        calls[name] += 1
        return method(self, *given)

    return called


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_drafts_are_those_of_the_layer_over_the_models_features(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature, "CHUNK", 8)  # the longest prompt takes three reads
    program = drafting(ahead=ahead, depth=5)
    passes: Counter[str] = Counter()
    for name in ("_read", "_evaluate"):
        monkeypatch.setattr(feature.FeatureDrafter, name, counted(name, passes))
    seen = drafts(program, monkeypatch)
    assert len(seen) > 20
    assert all(draft == chain(program, text, 5) for text, draft in seen)
    assert passes["_evaluate"] == passes["_read"] * (ceil(5 / ahead) - 1)  # to read the committed tokens is the first


def test_what_the_model_did_not_read_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program, sampling, text = drafting(ahead=2, depth=3), SAMPLINGS[1], PROMPTS[2]
    session = Session(lower(program), 1, 40)
    session.prefill([text[:9]])
    made = Decoding(session, [text], sampling, Limits(NEW))
    assert isinstance(made.drafter, feature.FeatureDrafter)
    propose = made.drafter.propose_all

    def told(rows: Any) -> dict[int, Drafted]:
        drafted = propose(rows)
        known = text + made.rows[0].tokens
        assert drafted[0].tokens[1:] == chain(program, known, 3, sampling, unseen=9)
        return drafted

    monkeypatch.setattr(made.drafter, "propose_all", told)
    assert sum(len(new) for _, new in made.run()) == NEW


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
