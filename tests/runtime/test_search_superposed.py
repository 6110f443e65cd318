"""Superposed Decoding equals a loop over whole texts of mixed embeddings; one draft is greedy."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.choice import Superposed
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import EMBEDDING, arguments
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.verify import verify
from smelt.model import Compiled
from smelt.passes import Samples, catalogue
from smelt.passes.events import ignore
from smelt.passes.manager import run
from smelt.passes.sample.superposed import Superposed as SuperposedPass
from smelt.passes.sample.superposed import counted
from smelt.recipes import load
from smelt.runtime.sampling import Sampling
from smelt.runtime.search import superposed
from smelt.runtime.search.make import writer
from smelt.runtime.search.ngrams import Ngrams
from smelt.runtime.session import Session
from smelt.runtime.writer import Limits

from ..ir.programs import cached, captured
from ..recipes.test_sample import ASKED, base, compiled, tokens
from ..recipes.test_sample import PROMPTS as TEXTS

NEW, WEIGHTS = 8, (0.3, 0.2, 0.5)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2], [7, 1, 8, 2, 8, 1, 8]]
COUNTED = torch.randint(0, 97, (40, 400), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"temperature": 0.2, "weights": WEIGHTS, "penalty": 3.0}


@cache
def plan(drafts: int, alpha: float) -> Plan:
    made = cached(captured("llama"), dense="float32")
    SuperposedPass(drafts=drafts, alpha=alpha, **OPTIONS).apply(made, Samples(COUNTED))
    verify(made)
    return lower(made, "cpp")


def written(drafts: int, alpha: float, eos: Any = ()) -> list[list[list[int]]]:
    """Every row's drafts, best first."""
    session = Session(plan(drafts, alpha), len(PROMPTS), max(map(len, PROMPTS)) + NEW)
    made = writer(session, PROMPTS, Sampling(), Limits(NEW, frozenset(eos)))
    list(made.run())
    return [[row.tokens, *map(list, made.others(number))] for number, row in enumerate(made.rows)]


@cache
def embedded() -> tuple[Program, torch.Tensor]:
    """The decoder without a cache, which reads embeddings in the place of tokens; and the table of embeddings."""
    made = captured("llama")
    (node,) = made.calls(EMBEDDING)
    made.facts["inputs"] = {"states": {"shape": ["B", "T", 64], "dtype": "float32"}}
    table = made.weights[arguments(node)["weight"].target].dense()
    with made.graph.inserting_before(next(iter(made.graph.nodes))):
        node.replace_all_uses_with(made.graph.placeholder("states"))
    made.graph.erase_node(node)
    derive(made)
    return made, table


@cache
def grams() -> tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]:
    """How often n-grams occur, and how often they do with something behind."""
    every: Counter[tuple[int, ...]] = Counter()
    followed: Counter[tuple[int, ...]] = Counter()
    for row in COUNTED.tolist():
        for n in range(1, len(WEIGHTS) + 2):
            every.update(tuple(row[at : at + n]) for at in range(len(row) - n + 1))
            followed.update(tuple(row[at : at + n]) for at in range(len(row) - n))
    return every, followed


def naive(prompt: list[int], drafts: int, alpha: float) -> list[list[int]]:
    program, table = embedded()
    every, followed = grams()
    states = table[prompt]
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(NEW):
        inputs = {"tokens": torch.zeros(1, len(states), dtype=torch.int64), "states": states[None]}
        law = interpret(program, {**inputs, "positions": torch.arange(len(states))[None]})["logits"][0, -1].double()
        best = (law / OPTIONS["temperature"]).topk(9)
        found = []
        for score, draft in live:
            text = prompt + draft
            for token, log_p in zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True):
                q = 0.0
                for length, weight in enumerate(WEIGHTS, 1):
                    end = tuple(text[-length:])
                    if len(text) >= length and followed[end]:
                        q += weight * every[(*end, token)] / followed[end]
                known = alpha * math.log(q) if q else -OPTIONS["penalty"]
                found.append((score + (1 - alpha) * log_p + (known if alpha else 0.0), [*draft, token]))
        live = sorted(found, key=lambda each: -each[0])[:drafts]
        shares = torch.tensor([score for score, _ in live]).exp()
        mixed = (shares / shares.sum()) @ table[[draft[-1] for _, draft in live]]
        states = torch.cat([states, mixed[None]])
    return [draft for _, draft in live]


@pytest.mark.parametrize("alpha", [0.0, 0.54])
def test_drafts_equal_a_loop_over_whole_texts(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [naive(prompt, 3, alpha) for prompt in PROMPTS]
    assert written(3, alpha) == wanted
    assert all(len({tuple(draft) for draft in row}) == 3 for row in wanted)
    monkeypatch.setattr(superposed, "mixture", lambda drafts: [math.exp(draft.score) for draft in drafts])
    assert written(3, alpha) != wanted  # shares that do not add up to 1


def test_one_draft_is_greedy_and_drafts_end_at_eos() -> None:
    (one,), *_ = written(1, 0.0)
    session = Session(plan(1, 0.0), 1, 32)
    assert plan(1, 0.0).program.inputs == ("tokens", "positions")
    text = list(PROMPTS[0])
    logits = session.prefill([text])["logits"][0]
    for token in one:
        assert int(logits.argmax()) == token
        text.append(token)
        logits = Session(plan(1, 0.0), 1, 32).prefill([text])["logits"][0]
    full = written(3, 0.0)
    ended = written(3, 0.0, eos=[full[0][0][3]])[0]
    assert any(draft[-1] == full[0][0][3] and len(draft) < NEW for draft in ended)


def test_ngrams_are_those_of_the_text_and_nothing_else() -> None:
    every, followed = grams()
    read = Ngrams(counted(COUNTED, 97, 4), 97, 4)
    text, asked = COUNTED[3, 5:8].tolist(), torch.arange(97)
    shares = read.shares(text, asked)
    for length in (1, 2, 3):
        end = tuple(text[-length:])
        meant = [every[(*end, token)] / followed[end] for token in range(97)]
        assert torch.equal(shares[length - 1], torch.tensor(meant, dtype=torch.float64))
    with pytest.raises(
        SmeltError, match=r"sample.superposed: sequences of 3 tokens hold no 4 in a row: calibrate with"
    ):
        counted(COUNTED[:, :3], 97, 4)


def over_compressed(samples: Samples | None, *overrides: str) -> Compiled:
    under, program = base(), base().program.fork()
    program.decode = None
    steps = [step for step in load("superposed", catalogue(), overrides).steps if step.name != "cache.insert"]
    return Compiled(run(program, steps, samples, ignore, None).program, {}, under.assets, "torch")


def test_over_compressed_weights_and_cache_saved_and_loaded(tmp_path: Path) -> None:
    off = ("sample.superposed.drafts=1", "sample.superposed.alpha=0")
    assert tokens(compiled("superposed", *off)) == tokens(base())
    samples = Samples(torch.tensor(base().tokenizer.encode(TEXTS[0] * 8))[None])
    lm = over_compressed(samples)
    asked = {"max_new_tokens": 6, "eos": ()}
    made = lm.complete(TEXTS, **asked).rows
    assert [len({tuple(row.tokens), *row.others}) for row in made] == [3, 3]
    lm.save(tmp_path / "out")
    back = smelt.load(tmp_path / "out", "torch")
    assert back.program.choice == lm.program.choice
    again = back.complete(TEXTS, **asked).rows
    assert [(row.tokens, row.others) for row in again] == [(row.tokens, row.others) for row in made]
    assert tokens(lm)[0] == lm.complete(TEXTS[:1], **ASKED).rows[0].tokens  # alone, from its first token
    with pytest.raises(SmeltError, match="superposed drafts cannot follow a grammar"):
        lm.complete(TEXTS, regex="[0-9]+", **asked)
    with pytest.raises(SmeltError, match="there are none: give texts with --calibration"):
        over_compressed(None)
    with pytest.raises(SmeltError, match="already searches by superposed"):
        run(lm.program.fork(), load("superposed", catalogue()).steps[1:], samples, ignore, None)
    with pytest.raises(SmeltError, match=r"searches by superposed.*without drafts"):
        run(lm.program.fork(), load("prompt-lookup", catalogue()).steps[1:], samples, ignore, None)


def test_options_that_cannot_hold() -> None:
    for wrong in ({"drafts": 0}, {"candidates": 2}, {"alpha": 1.5}, {"temperature": 0.0}, {"weights": ()}):
        with pytest.raises(SmeltError):
            Superposed(**wrong)
