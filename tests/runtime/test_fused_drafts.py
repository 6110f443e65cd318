"""Drafts by a layer over tokens and features: no token changes, and its cache holds what the model said."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import HEAD
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes.decode.feature import Feature
from smelt.passes.decode.fuse import Fuse
from smelt.passes.decode.lookup import Lookup
from smelt.runtime import artefact
from smelt.runtime.drafters import feature, fused
from smelt.runtime.drafters.base import Drafted
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured

NEW = 12
PROMPTS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (3, 1, 17)
]
SAMPLINGS = [Sampling(), Sampling(temperature=1.2, seed=2)]


def drafting(family: str = "llama", random: bool = True) -> Program:
    """With random weights no mistake hides behind a zero."""
    program = cached(captured(family), dense="float32")
    Fuse(dtype="float32", heads=3, width=4, nodes=9).apply(program, None)
    assert program.draft is not None
    generator = torch.Generator().manual_seed(1)
    for name in program.draft.facts["own"] if random else ():
        if name.startswith("feature.") and ".norm." not in name:
            data = program.draft.weights[name].parts["data"]
            data.copy_(torch.randn(data.shape, generator=generator) / 8)
    verify(program)
    return program


@cache
def plan(family: str = "llama", random: bool = True) -> Plan:
    return lower(drafting(family, random))


def decoded(plan: Plan, sampling: Sampling, speculate: bool = True) -> list[list[int]]:
    session = Session(plan, len(PROMPTS), max(map(len, PROMPTS)) + NEW - 1)
    made = Decoding(session, PROMPTS, sampling, Limits(NEW), speculate)
    for _ in made.run():
        pass
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize(("family", "random"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_no_token_changes(family: str, random: bool) -> None:
    for sampling in SAMPLINGS:
        assert decoded(plan(family, random), sampling) == decoded(plan(family, random), sampling, speculate=False)


def guesses(program: Program, text: list[int]) -> list[int]:
    """The tree behind a text, read at once and without a cache."""
    assert program.draft is not None and program.decode is not None
    ids, places = torch.tensor([text]), torch.arange(len(text))[None]
    features = interpret(program, {"tokens": ids, "positions": places})["features"][:, :-1]
    before = torch.tensor([[[0 if t == 0 else text[t - 1], text[t]] for t in range(len(text) - 1)]])
    inputs = {"tokens": ids[:, 1:], "positions": places[:, :-1], "features": features, "before": before}
    best = interpret(program.draft, inputs)["logits"][0, -1].topk(4, -1).indices
    tree = program.decode.draft.tree  # type: ignore[attr-defined]
    return [int(best[depth - 1, rank]) for depth, rank in zip(tree.depths[1:], tree.ranks[1:], strict=True)]


def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """(text, draft) of every step and row of a greedy generation, prompts being read in several pieces."""
    seen: list[tuple[list[int], list[int]]] = []
    propose = fused.FusedDrafter.propose_all

    def told(self: fused.FusedDrafter, rows: Any) -> dict[int, Drafted]:
        made = propose(self, rows)
        seen.extend((list(self.tokens[row]), made[row].tokens[1:]) for row in rows)
        return made

    monkeypatch.setattr(feature, "CHUNK", 8)
    monkeypatch.setattr(fused.FusedDrafter, "propose_all", told)
    decoded(plan(), Sampling())
    return seen


def test_drafts_are_those_of_a_layer_that_reads_the_text_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = drafts(monkeypatch)
    assert len(seen) > 15
    assert all(draft == guesses(plan().program, text) for text, draft in seen)


def test_other_tokens_in_front_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    known = fused.FusedDrafter._known

    def turned(self: fused.FusedDrafter, features: torch.Tensor) -> dict[str, torch.Tensor]:
        given = known(self, features)
        return {**given, "before": given["before"].flip(-1)}

    monkeypatch.setattr(fused.FusedDrafter, "_known", turned)
    assert any(draft != guesses(plan().program, text) for text, draft in drafts(monkeypatch))


def test_an_artefact_holds_the_layer_and_its_heads(tmp_path: Path) -> None:
    artefact.save(tmp_path / "out", plan().program, {}, {})
    loaded, _ = artefact.load(tmp_path / "out")
    assert same_program(plan().program, loaded) is None
    assert decoded(lower(loaded), SAMPLINGS[1]) == decoded(plan(), SAMPLINGS[1])


def test_it_joins_other_drafters() -> None:
    program = drafting()
    Lookup().apply(program, None)
    both = lower(program)
    assert decoded(both, SAMPLINGS[1]) == decoded(both, SAMPLINGS[1], speculate=False)


def test_what_does_not_fit_is_said() -> None:
    program = drafting()
    assert "llama must not have a draft model yet: keep one of the two steps" in list(Fuse().requires(program))
    assert "llama must not have a draft model yet: keep one of the two steps" in list(Feature().requires(program))
    fresh = cached(captured("llama"), dense="float32")
    assert list(Fuse().requires(fresh)) == []
    assert list(Fuse(width=98).requires(fresh)) == ["width must be at most the vocabulary of 97 tokens, but is 98"]
    deep, shallow = drafting(), cached(captured("llama"), dense="float32")
    Fuse(dtype="float32", heads=2, width=4, nodes=9).apply(shallow, None)
    deep.draft = shallow.draft
    with pytest.raises(SmeltError, match="the tree is 3 deep, but the layer over the features has 2 heads"):
        verify(deep)
    deep.draft = drafting().draft
    assert deep.draft is not None
    (head,) = deep.draft.calls(HEAD)
    deep.draft.weights[str(head.args[1].target)] = Weight.of(torch.zeros(96, 64))  # type: ignore[union-attr]
    deep.draft.facts["vocabulary"] = 96
    with pytest.raises(SmeltError, match="the draft model has 96 tokens, the model 97"):
        verify(deep)
