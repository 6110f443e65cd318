"""The decoding loop: plain decoding is the model's own, rows end on their own, and noise belongs to the request."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import FAMILIES, cached, captured

VOCABULARY, NEW = 97, 24
PROMPTS = [
    torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 1, 17, 40)
]
WARM = Sampling(temperature=1.0, seed=4)


@cache
def plan(family: str = "llama") -> Plan:
    return lower(cached(captured(family)))


def decoding(prompts: list[list[int]], sampling: Sampling, new: int = NEW, eos: Any = (), **options: Any) -> Decoding:
    session = Session(plan(options.pop("family", "llama")), len(prompts), max(map(len, prompts)) + new - 1)
    return Decoding(session, prompts, sampling, Limits(new, frozenset(eos)), **options)


def tokens(made: Decoding) -> list[list[int]]:
    """What every row got, which is what was yielded for it."""
    yielded: list[list[int]] = [[] for _ in made.rows]
    for number, fresh in made.run():
        yielded[number] += fresh
    assert yielded == [row.tokens for row in made.rows] and all(row.done for row in made.rows)
    return yielded


@cache
def plain(sampling: Sampling) -> list[list[int]]:
    return tokens(decoding(PROMPTS, sampling))


def naive(family: str, prompt: list[int], new: int) -> list[int]:
    """Greedy by the interpreter, the whole text again for every token."""
    text = list(prompt)
    for _ in range(new):
        inputs = {"tokens": torch.tensor([text]), "positions": torch.arange(len(text))[None]}
        text.append(int(interpret(captured(family), inputs)["logits"][0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_a_loop_over_the_interpreter(family: str) -> None:
    made = decoding(PROMPTS, Sampling(), 12, family=family)
    assert tokens(made) == [naive(family, prompt, 12) for prompt in PROMPTS]
    assert (made.counts.steps, made.counts.tokens) == (11, 44)  # the first token of a row is its prompt's
    assert {row.reason for row in made.rows} == {"length"}


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.3, repetition_penalty=1.3)], ids=str)
def test_a_row_does_not_depend_on_its_batch(sampling: Sampling) -> None:
    """Given its request id, whatever the order and company; without one it has the noise of its row number."""
    together = tokens(decoding(PROMPTS, sampling, requests=[7, 3, 9, 1]))
    for number, request in enumerate((7, 3, 9, 1)):
        assert tokens(decoding([PROMPTS[number]], sampling, requests=[request])) == [together[number]]
    turned = tokens(decoding(PROMPTS[::-1], sampling, requests=[1, 9, 3, 7]))
    assert turned[::-1] == together
    assert plain(sampling) == tokens(decoding(PROMPTS, sampling, requests=[0, 1, 2, 3]))
    assert sampling.greedy or plain(sampling) != together


def test_a_seed_is_a_draw() -> None:
    assert tokens(decoding(PROMPTS, WARM)) == plain(WARM)
    assert plain(Sampling(temperature=1.0, seed=5)) != plain(WARM)
    same = tokens(decoding([PROMPTS[0]] * 3, WARM))
    assert same[0] != same[1] != same[2]  # equal prompts of one batch are different requests


def test_the_repetition_penalty_knows_prompt_and_answer() -> None:
    strong = Sampling(repetition_penalty=1e6)
    for prompt, row in zip(PROMPTS, tokens(decoding(PROMPTS, strong)), strict=True):
        assert not set(row) & set(prompt) and len(set(row)) == NEW


def test_rows_end_at_the_end_token_and_the_others_go_on() -> None:
    full = plain(WARM)
    ends = [full[0][4], full[2][9]]
    made = decoding(PROMPTS, WARM, eos=ends)
    for row, all_of_it in zip(made_rows(made), full, strict=True):
        first = min((all_of_it.index(end) for end in ends if end in all_of_it), default=NEW)
        assert row.tokens == all_of_it[: first + 1]
        assert row.reason == ("eos" if first < NEW else "length")
    lengths = {len(row.tokens) for row in made.rows}
    assert len(lengths) > 1 and made.counts.steps == max(lengths) - 1


def made_rows(made: Decoding) -> list[Any]:
    tokens(made)
    return made.rows


def test_a_row_that_ends_with_its_prompt_takes_no_step() -> None:
    made = decoding([PROMPTS[0]], Sampling(), eos=[plain(Sampling())[0][0]])
    assert tokens(made) == [plain(Sampling())[0][:1]]
    assert (made.rows[0].reason, made.counts.steps, made.counts.tokens) == ("eos", 0, 0)
    once = decoding([PROMPTS[0]], Sampling(), 1)
    assert tokens(once) == [plain(Sampling())[0][:1]] and once.rows[0].reason == "length"


def test_a_row_can_be_stopped_from_outside() -> None:
    made = decoding(PROMPTS, Sampling())
    for number, _ in made.run():
        if number == 1 and len(made.rows[1].tokens) == 3:
            made.stop(1)
    assert made.rows[1].tokens == plain(Sampling())[1][:3] and made.rows[1].reason == "stop"
    assert [row.tokens for row in (made.rows[0], *made.rows[2:])] == [plain(Sampling())[i] for i in (0, 2, 3)]


def test_every_step_is_told() -> None:
    told: list[int] = []
    made = decoding(PROMPTS, Sampling(), step_done=lambda: told.append(1))
    tokens(made)
    assert len(told) == made.counts.steps == NEW - 1


def test_the_context_may_be_filled_and_not_exceeded() -> None:
    session = Session(plan(), 1, 12)
    made = Decoding(session, [PROMPTS[0]], Sampling(), Limits(10))
    assert tokens(made) == [plain(Sampling())[0][:10]] and session.cache.lengths == [12]
    with pytest.raises(SmeltError, match="prompt 0 has 3 tokens and 11 more are asked for, but the context ends at 12"):
        Decoding(Session(plan(), 1, 12), [PROMPTS[0]], Sampling(), Limits(11))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt was given"),
        ([[3], []], {}, "prompt 1 is empty; give at least one token"),
        ([[3], [4, VOCABULARY]], {}, "prompt 1 holds token 97, the vocabulary has ids 0 to 96"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([[3], [4]], {"requests": [1]}, "2 prompts need as many request ids, not 1"),
    ],
)
def test_what_cannot_be_read_is_refused(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SmeltError, match=f"generate: .*{message}|generate: {message}"):
        Decoding(Session(plan(), max(1, len(prompts)), 40), prompts, Sampling(), Limits(4), **options)
