"""Drafts by prompt tokens: no token changes, and every guess is that of one behind the accepted text alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.decode.prompts import PROMPTS, Prompts
from smelt.passes.train.prompts import Prompts as Train
from smelt.runtime import artefact
from smelt.runtime.drafters.base import Aside, Drafted
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured, quantized

NEW, VOCABULARY = 24, 97
TEXTS = [
    torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 1, 17)
]
SAMPLINGS = [Sampling(), Sampling(temperature=1.2, seed=2)]
CODED: dict[str, Any] = {"keys": Affine(8, 4), "values": Affine(8, 16), "sink": 2, "tail": 8, "page": 6}


def drafting(family: str = "llama", compressed: bool = False, rows: int = 31) -> Program:
    """Prompt tokens are random, so that they guess something else at every place."""
    program = quantized(captured(family), Affine(4, 32)) if compressed else captured(family)
    program = cached(program, **(CODED if compressed else {"dense": "float32"}))
    Prompts(prompts=2, width=8, rows=rows, dtype="float32").apply(program, None)
    random = torch.Generator().manual_seed(1)
    program.weights[PROMPTS] = Weight.of(torch.randn(program.weights[PROMPTS].shape, generator=random) / 8)
    verify(program)
    return program


@cache
def plan(family: str = "llama", compressed: bool = False) -> Plan:
    return lower(drafting(family, compressed))


def decoding(plan: Plan, sampling: Sampling, speculate: bool = True, spare: int = 0) -> Decoding:
    session = Session(plan, len(TEXTS), max(map(len, TEXTS)) + NEW - 1 + spare)
    return Decoding(session, TEXTS, sampling, Limits(NEW), speculate)


def decoded(plan: Plan, sampling: Sampling, speculate: bool = True) -> Decoding:
    made = decoding(plan, sampling, speculate)
    for _ in made.run():
        pass
    return made


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize(("family", "compressed"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_no_token_changes(family: str, compressed: bool) -> None:
    made = plan(family, compressed)
    for sampling in SAMPLINGS:
        drafted = decoded(made, sampling)
        assert tokens(drafted) == tokens(decoded(made, sampling, speculate=False))
        assert drafted.counts.steps < NEW - 1


def wrong(program: Program) -> tuple[int, int]:
    """(drafts that are not what prompt tokens behind the text guess, drafts of two places) of a generation."""
    made, seen = decoding(lower(program), SAMPLINGS[1], spare=4), []  # guesses reach beyond what is written
    drafter = made.drafter
    assert drafter is not None
    propose = drafter.propose

    def told(row: int) -> Drafted:
        draft = propose(row)
        seen.append((list(made.rows[row].prompt) + made.rows[row].tokens, draft))
        return draft

    drafter.propose = told  # type: ignore[method-assign]
    for _ in made.run():
        pass
    missed = deep = 0
    for text, draft in seen:
        depth = [0] * len(draft.tokens)
        for node in range(1, len(depth)):
            depth[node] = depth[draft.parents[node]] + 1
        known = max(depth)
        ids = torch.tensor([[*text[:-1], *range(VOCABULARY, VOCABULARY + known)]])
        logits = interpret(program, {"tokens": ids, "positions": torch.arange(ids.shape[1])[None]})["logits"][0]
        best = logits[len(text) - 1 :].topk(8, -1).values
        rank: dict[int, int] = {}
        for node in range(1, len(depth)):
            parent, place = draft.parents[node], depth[node] - 1
            found = logits[len(text) - 1 + place, draft.tokens[node]]
            missed += bool((found - best[place, rank.get(parent, 0)]).abs() > 1e-4)
            rank[parent] = rank.get(parent, 0) + 1
        deep += known == 2
    return missed, deep


def test_guesses_are_those_behind_the_accepted_text(monkeypatch: pytest.MonkeyPatch) -> None:
    missed, deep = wrong(drafting())
    assert missed == 0 and deep > 5
    made = Aside.__init__
    mutants = {
        "rows see the pending token and no node behind it": lambda seen, nodes: (seen, [0] * len(nodes)),
        "rows see those of other nodes": lambda seen, nodes: (torch.ones_like(seen).tril(1), nodes),
    }
    for name, mutant in mutants.items():

        def broken(self: Aside, tokens: Any, depths: Any, seen: Any, nodes: Any, mutant: Any = mutant) -> None:
            made(self, tokens, depths, *mutant(seen, nodes))

        monkeypatch.setattr(Aside, "__init__", broken)
        assert wrong(drafting())[0] > 0, name


def test_fewer_rows_are_a_smaller_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sampling = plan(), SAMPLINGS[0]
    assert made.program.decode is not None
    wanted, whole = tokens(decoded(made, sampling)), made.program.decode
    for limit in (1, 4, 9):
        monkeypatch.setattr(made.program, "decode", replace(whole, limits=(limit, limit)))
        found = decoded(made, sampling)
        assert found.drafter is not None and tokens(found) == wanted
        rows = [len(cut.parents) - 1 + cut.behind[-1].stop - len(cut.parents) for cut in found.drafter._cuts]  # type: ignore[attr-defined]
        assert limit // 2 < max(rows) <= limit


def test_an_artefact_holds_the_prompt_tokens(tmp_path: Path) -> None:
    program = plan().program
    artefact.save(tmp_path / "out", program, {}, {})
    loaded, _ = artefact.load(tmp_path / "out")
    assert same_program(program, loaded) is None and loaded.decode == program.decode
    assert torch.equal(loaded.weights[PROMPTS].dense(), program.weights[PROMPTS].dense())
    assert tokens(decoded(lower(loaded), SAMPLINGS[1])) == tokens(decoded(plan(), SAMPLINGS[1]))


def test_a_prompt_may_not_hold_prompt_tokens() -> None:
    session = Session(plan(), 1, 40)
    with pytest.raises(SmeltError, match="prompt 0 holds token 97, the vocabulary has ids 0 to 96"):
        list(Decoding(session, [[5, VOCABULARY]], SAMPLINGS[0], Limits(4)).run())


def test_what_was_learned_saves_steps() -> None:
    program = drafting(rows=7)
    before = decoded(lower(program.fork()), SAMPLINGS[0])
    written = torch.tensor(tokens(before)).repeat(4, 1)
    Train(steps=40, batch=4, length=NEW, rate=0.1, places=8, checks=2).apply(program, Samples(written))
    learned = decoded(lower(program), SAMPLINGS[0])
    assert tokens(learned) == tokens(before)
    assert learned.counts.steps < before.counts.steps - 2, (learned.counts, before.counts)
