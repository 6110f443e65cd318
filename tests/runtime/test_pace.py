"""Drafting may pause at any step: no token changes, drafters stay right, and no way is held to for long in vain."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import cycle
from math import log2
from typing import Any

import pytest

import smelt
from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir import decode as plans
from smelt.ir.decode import DecodePlan
from smelt.passes.decode.draft import Draft
from smelt.runtime import pace as pacing
from smelt.runtime.drafters import feature
from smelt.runtime.drafters.table import RecycleDrafter
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.pace import LOOK, MOST, Emitted, Pace
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from .. import tiny
from ..ir.programs import cached, captured
from . import test_feature_drafts
from .test_speculation import COMPRESSED, DENSE, DRAFTS, PROMPTS, SAMPLINGS, UNION, Case, plain, plan

NEW = 40


class Turns(Pace):
    """Takes these ways in turns, whatever they cost: one draft, one plain step, drafts, and a long pause."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[bool, float]] = []  # and the tokens that a row got
        self._next = cycle([True, False, True, True, *[False] * 11])
        self.drafts = next(self._next)

    def _took(self, seconds: float, tokens: float) -> None:
        self.taken.append((self.drafts, tokens))
        self.drafts = next(self._next)


def decoded(made: Plan, sampling: Sampling, pace: Pace | None, prompts: Any = PROMPTS, new: int = NEW) -> Decoding:
    """Without a pace nothing is drafted."""
    session = Session(made, len(prompts), max(map(len, prompts)) + new - 1)
    writer = Decoding(session, prompts, sampling, Limits(new), pace is not None, pace=pace)
    for _ in writer.run():
        pass
    assert writer.counts.tokens == sum(len(row.tokens) for row in writer.rows) - len(prompts)
    return writer


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize("case", [DENSE, Case(drafter="heads"), COMPRESSED], ids=["recycle", "heads", "compressed"])
def test_pauses_change_no_token(case: Case) -> None:
    for name in ("greedy", "hot", "top p", "warm penalty"):
        turns = Turns()
        assert tokens(decoded(plan(case), SAMPLINGS[name], turns)) == plain(case, SAMPLINGS[name]), name
        assert {way for way, _ in turns.taken} == {True, False}


@pytest.mark.parametrize("draft", [*DRAFTS.values(), UNION], ids=[*DRAFTS, "union"])
def test_every_drafter_goes_on_behind_a_pause(draft: plans.Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: plain(DENSE, SAMPLINGS[name]) for name in ("greedy", "hot", "top p")}
    monkeypatch.setattr(plan(DENSE).program, "decode", DecodePlan(draft))
    for name, answer in wanted.items():
        assert tokens(decoded(plan(DENSE), SAMPLINGS[name], Turns())) == answer, name


def test_a_clock_that_runs_ever_faster_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every judgement then finds that the present way got dearer."""
    monkeypatch.setattr(pacing, "LOOK", 2)
    now, past = [1.0], set()

    def clock() -> float:
        now[0] *= 2
        past.add(pace.drafts)
        return now[0]

    pace = Pace(clock)
    assert tokens(decoded(plan(DENSE), SAMPLINGS["hot"], pace)) == plain(DENSE, SAMPLINGS["hot"])
    assert past == {True, False}


@pytest.mark.parametrize("sampling", ["greedy", "hot", "top p"])
def test_a_draft_model_reads_what_came_without_it(sampling: str) -> None:
    """A draft model that leaves nothing out is always right, if it knows all that came."""
    program = cached(captured("llama"), dense="float32")
    program.draft = program.fork()
    Draft(depth=3).apply(program, None)
    turns = Turns()
    paused = decoded(lower(program), SAMPLINGS[sampling], turns, PROMPTS[:1])
    drafted = [count for way, count in turns.taken if way]
    assert len(paused.rows[0].tokens) == NEW and len(drafted) > 5 and {*drafted} == {4}


def drafts_of_the_layer(patch: pytest.MonkeyPatch, *samplings: Sampling) -> list[bool]:
    """Whether each draft of a greedy generation with pauses is what the layer says of the model's features."""
    program, right = test_feature_drafts.drafting(depth=3), []
    propose = feature.FeatureDrafter.propose_all

    def told(self: feature.FeatureDrafter, rows: Any) -> Any:
        made = propose(self, rows)
        texts = {row: list(self.tokens[row]) for row in rows}
        inside = [row for row in rows if len(texts[row]) + 3 <= self.session.cache.capacity]
        right.extend(made[row].tokens[1:] == test_feature_drafts.chain(program, texts[row], 3) for row in inside)
        return made

    patch.setattr(feature.FeatureDrafter, "propose_all", told)
    made = lower(program)
    for sampling in samplings:
        paused, never = (decoded(made, sampling, pace, PROMPTS[:2], new=24) for pace in (Turns(), None))
        assert tokens(paused) == tokens(never)
    return right


def test_features_of_a_pause_are_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing, on_the_host = Sampling(), Sampling(repetition_penalty=1.3)
    assert all(drafts_of_the_layer(monkeypatch, choosing, on_the_host))
    chain = Session.chain
    monkeypatch.setattr(Session, "chain", lambda self, *given: chain(self, *given[:4]))
    assert not all(drafts_of_the_layer(monkeypatch, choosing))


def test_rules_whose_tokens_depend_on_the_draft_are_not_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(plan(DENSE), 1, 64)
    for rule, paced in ((plans.Walk(), True), (plans.Reject(), False), (plans.Trust(), False)):
        monkeypatch.setattr(plan(DENSE).program, "decode", DecodePlan(plans.Lookup(), rule))
        assert (Decoding(session, [[1]], Sampling(), Limits(2), pace=Pace())._pace is not None) == paced


def test_stop_strings_and_streams_are_the_same_with_pauses() -> None:
    steps: list[Any] = ["cache.insert", {"decode.recycle": {"nodes": 12}}]
    lm = smelt.compile(tiny.model(), {"name": "n", "family": "deploy", "does": "x", "steps": steps})
    full = lm.generate("def f(x):", max_new_tokens=40, speculate=False)
    options: dict[str, Any] = {"max_new_tokens": 40, "stop": [full[20:22]]}
    lm._paces[True, 2] = turns = Turns()
    made, alone = (lm.complete(["def f(x):", "import"], **options, speculate=way) for way in (True, False))
    assert [(row.text, row.tokens) for row in made.rows] == [(row.text, row.tokens) for row in alone.rows]
    assert any(not way for way, _ in turns.taken)
    lm._paces[True, 1] = turns = Turns()
    assert "".join(lm.stream("def f(x):", **options)) == alone.rows[0].text and turns.taken
    assert lm.complete(["def"], max_new_tokens=9, speculate="always").steps and set(lm._paces) == {(True, 1), (True, 2)}
    with pytest.raises(smelt.SmeltError, match="speculate is True"):
        lm.generate("def", speculate="sometimes")


def ways(costs: Callable[[bool, int], float], steps: int) -> list[bool]:
    """Which way each step of a row takes on a machine where a step costs so many seconds."""
    now, taken = [0.0], list[bool]()
    pace = Pace(lambda: now[0])

    def made(way: bool) -> Generator[Emitted, None, None]:
        while len(taken) < steps:
            now[0] += costs(way, len(taken))
            taken.append(way)
            yield [(0, [7, 7] if way else [7])]

    while len(taken) < steps:
        for _ in pace.watched(made(pace.drafts)):
            pass
    return taken


@pytest.mark.parametrize("hiccup", [0, 7])
def test_the_dearer_way_is_looked_at_seldom(hiccup: int) -> None:
    """Drafts give two tokens a step: 3 seconds are too many, 1.5 pay. Every seventh step may take much longer."""

    def late(step: int) -> float:
        return 50.0 if hiccup and step % hiccup == 0 else 0.0

    for steps in (100, 1000):
        dear = ways(lambda way, step: 3 * way + 1 * (not way) + late(step), steps)
        paying = ways(lambda way, step: 1.5 * way + 1 * (not way) + late(step), steps)
        assert dear.count(True) <= LOOK * (2 + log2(steps / LOOK))
        assert paying.count(False) <= LOOK * (2 + log2(steps / LOOK))


def test_no_way_is_held_to_for_ever() -> None:
    """Drafts are dear for 20,000 steps, and pay from then on: a look comes after so many of its own length at most."""
    taken = ways(lambda way, step: (9 if step < 20_000 else 1) * way + (not way), 40_000)
    dear = 9 * LOOK * MOST
    assert taken[:20_000].count(True) < 20_000 * 9 / 100 and all(taken[20_000 + 2 * dear : 20_000 + 2 * dear + 16])


def test_a_machine_on_which_drafts_are_slow_drafts_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = [0], [0]
    propose = RecycleDrafter.propose

    def counted(self: RecycleDrafter, row: int) -> Any:
        asked[0] += 1
        return propose(self, row)

    monkeypatch.setattr(RecycleDrafter, "propose", counted)

    def step_done() -> None:
        done[0] += 1

    session, pace = Session(plan(DENSE), 1, 400), Pace(lambda: done[0] + 99.0 * asked[0])
    writer = Decoding(session, PROMPTS[:1], Sampling(), Limits(300), step_done=step_done, pace=pace)
    for _ in writer.run():
        pass
    assert LOOK <= asked[0] <= 3 * LOOK and len(writer.rows[0].tokens) == 300
