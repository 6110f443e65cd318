"""Searches and presets: each equals a loop over whole texts, and plain decoding where its options say so."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.choice import Cautious, ChoicePlan, Contrastive, Preset, Search
from smelt.ir.decode import DecodePlan, Lookup
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.text import parse_program, print_program, same_program
from smelt.ir.verify import verify
from smelt.passes.decode.lookup import Lookup as LookupPass
from smelt.passes.sample.cautious import Cautious as CautiousPass
from smelt.passes.sample.contrastive import Contrastive as ContrastivePass
from smelt.passes.sample.preset import Preset as PresetPass
from smelt.runtime.sampling import Sampling, choose
from smelt.runtime.search.cautious import TRIALS
from smelt.runtime.search.make import writer
from smelt.runtime.session import Session
from smelt.runtime.writer import Limits

from ..ir.programs import cached, captured

NEW = 10
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2], [7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5]]
WARM = Sampling(temperature=1.0, seed=4)
CODED: dict[str, Any] = {"tail": 8, "page": 8, "keys": Affine(8, 8, "channel", True), "values": Affine(8, 16)}
HARD = Cautious(most=4, low=0.5, high=5.0, length=5, ends=tuple(range(0, 97, 6)))


@cache
def program(coded: bool = False) -> Program:
    """A tiny decoder over a cache, with its hidden state as an output."""
    made = cached(captured("llama"), **(CODED if coded else {}))
    ContrastivePass().apply(made, None)
    made.choice = None
    derive(made)
    return made


@cache
def plan(search: Search | None = None, coded: bool = False) -> Plan:
    made = program(coded).fork()
    made.choice = ChoicePlan(search=search)
    return lower(made, "torch" if coded else "cpp")


def written(
    search: Search | None,
    sampling: Sampling,
    prompts: Any = PROMPTS,
    new: int = NEW,
    eos: Any = (),
    coded: bool = False,
) -> Any:
    session = Session(plan(search, coded), len(prompts), max(map(len, prompts)) + new)
    made = writer(session, prompts, sampling, Limits(new, frozenset(eos)))
    yielded: list[list[int]] = [[] for _ in prompts]
    for number, fresh in made.run():
        yielded[number] += fresh
    assert yielded == [row.tokens for row in made.rows] and all(row.done for row in made.rows)
    return made


def tokens(*args: Any, **options: Any) -> list[list[int]]:
    return [row.tokens for row in written(*args, **options).rows]


@cache
def whole() -> Program:
    """The same decoder without a cache."""
    made = captured("llama")
    made.set_output("hidden", next(n for n in made.graph.nodes if n.name == program().outputs["hidden"].name))
    derive(made)
    return made


def read(text: list[int]) -> dict[str, torch.Tensor]:
    inputs = {"tokens": torch.tensor([text]), "positions": torch.arange(len(text))[None]}
    return {name: value[0] for name, value in interpret(whole(), inputs).items()}


def naive_contrastive(prompt: list[int], count: int, alpha: float, behind: int = 0) -> list[int]:
    """Over whole texts; `behind`: states that are forgotten, such as those of the prompt."""
    text = list(prompt)
    for _ in range(NEW):
        law = read(text)["logits"][-1].double().softmax(-1)
        scores = {}
        for token in law.topk(count).indices.tolist():
            states = torch.nn.functional.normalize(read([*text, token])["hidden"], dim=-1)
            near = (states[behind:-1] @ states[-1]).max() if len(text) > behind else 0.0
            scores[token] = float((1 - alpha) * law[token] - alpha * near)
        text.append(max(scores, key=lambda token: scores[token]))
    return text[len(prompt) :]


def test_contrastive_search_equals_a_loop_over_whole_texts() -> None:
    made = written(Contrastive(3, 0.6), Sampling())
    wanted = [naive_contrastive(prompt, 3, 0.6) for prompt in PROMPTS]
    assert [row.tokens for row in made.rows] == wanted
    assert (made.counts.steps, made.counts.tokens) == (NEW, NEW * len(PROMPTS))  # a token a step, the first one too
    assert wanted != tokens(None, Sampling())  # the penalty decides
    assert wanted != [naive_contrastive(prompt, 3, 0.6, len(prompt)) for prompt in PROMPTS]  # and so does the prompt


@pytest.mark.parametrize("search", [Contrastive(4, 0.0), Contrastive(1, 0.6)], ids=str)
def test_contrastive_search_without_penalty_or_choice_is_greedy(search: Contrastive) -> None:
    assert tokens(search, Sampling(), coded=True) == tokens(None, Sampling(), coded=True)


@pytest.mark.parametrize(("search", "sampling"), [(Contrastive(3, 0.6), Sampling()), (HARD, WARM)], ids=["c", "n"])
def test_a_row_of_a_search_does_not_depend_on_its_batch(search: Search, sampling: Sampling) -> None:
    together = tokens(search, sampling, coded=True)
    assert tokens(search, sampling, PROMPTS[:1], coded=True) == together[:1]


def test_a_search_ends_at_eos_and_needs_room_for_what_it_reads() -> None:
    full = tokens(Contrastive(3, 0.6), Sampling())
    made = written(Contrastive(3, 0.6), Sampling(), eos=(full[0][4],))
    cut = full[0].index(full[0][4]) + 1
    assert made.rows[0].tokens == full[0][:cut] and made.rows[0].reason == "eos"
    session = Session(plan(Contrastive(3, 0.6)), 1, len(PROMPTS[0]) + NEW - 1)
    with pytest.raises(SmeltError, match="the context ends at 21; shorten the prompt"):
        writer(session, PROMPTS[:1], Sampling(), Limits(NEW))


def naive_cautious(prompt: list[int], request: int, search: Cautious, sampling: Sampling) -> list[int]:
    """Trial by trial over whole texts."""
    text = list(prompt)

    def law(more: list[int]) -> torch.Tensor:
        return sampling.process(read([*text, *more])["logits"][-1:])

    def drawn(trial: int, most: int) -> tuple[float, list[int]]:
        more: list[int] = []
        score = 0.0
        seed = sampling.seed ^ (TRIALS + trial) if trial else sampling.seed
        while len(more) < most and not (more and more[-1] in search.ends):
            here = law(more)
            at = torch.tensor([len(text) + len(more)])
            more.append(int(choose(here, replace(sampling, seed=seed), request, at)[0]))
            score += float(here.double().log_softmax(-1)[0, more[-1]])
        return -score / len(more), more

    while (left := NEW - (len(text) - len(prompt))) > 0:
        p = law([])[0].double().softmax(-1)
        entropy = float(-(p * p.clamp_min(1e-300).log()).sum())
        wished = math.floor(search.most * (entropy - search.low) / (search.high - search.low))
        trials = max(1, min(search.most, wished))
        text += min(drawn(t, 1 if trials == 1 else min(search.length, left)) for t in range(trials))[1]
    return text[len(prompt) :]


def test_cautious_search_equals_trial_after_trial_over_whole_texts() -> None:
    made = tokens(HARD, WARM)
    assert made == [naive_cautious(prompt, number, HARD, WARM) for number, prompt in enumerate(PROMPTS)]
    assert made != tokens(None, WARM)


def test_cautious_search_of_one_trial_is_plain_sampling() -> None:
    one = replace(HARD, most=1)
    for sampling in (WARM, Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=2)):
        assert tokens(one, sampling, coded=True) == tokens(None, sampling, coded=True)
    assert tokens(HARD, Sampling(), coded=True) == tokens(None, Sampling(), coded=True)  # nothing is drawn
    assert [HARD.trials(entropy) for entropy in (0.0, 0.5, 1.7, 3.0, 4.9, 9.0)] == [1, 1, 1, 2, 3, 4]


def test_a_choice_plan_is_part_of_the_text() -> None:
    made = program().fork()
    made.choice = ChoicePlan(Preset(temperature=0.8, typical_p=0.95), HARD)
    back = parse_program(print_program(made), made.weights)
    assert back.choice == made.choice and same_program(made, back) is None
    back.choice = replace(made.choice, preset=Preset(temperature=0.7, typical_p=0.95))
    assert "choice.preset.temperature" in str(same_program(made, back))
    with pytest.raises(SmeltError, match="unknown kind 'contrastiv' \\(did you mean 'contrastive'"):
        ChoicePlan.from_dict({"search": {"kind": "contrastiv"}})


def test_passes_leave_logits_alone_and_refuse_what_does_not_go_together() -> None:
    made = cached(captured("llama"))
    derive(made)
    before = set(made.outputs)
    ContrastivePass(candidates=5).apply(made, None)
    PresetPass(temperature=0.7).apply(made, None)
    verify(made)
    assert set(made.outputs) == {*before, "hidden"}
    assert made.choice == ChoicePlan(Preset(temperature=0.7), Contrastive(5, 0.6))
    assert ["already searches by contrastive" in why for why in CautiousPass(ends=(1,)).requires(made)] == [True]
    assert ["searches by contrastive" in why for why in LookupPass().requires(made)] == [True]
    made.decode = DecodePlan(Lookup())
    with pytest.raises(SmeltError, match="contrastive search chooses without drafts"):
        verify(made)
    made.choice = None
    assert ["decodes by lookup" in why for why in ContrastivePass().requires(made)] == [True]
    assert not [*PresetPass(typical_p=0.9).requires(made)]  # any drafter goes along
    assert ["with a tokenizer" in why for why in CautiousPass().requires(program())] == [True]
    for wrong in ({"typical_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"repetition_penalty": 0.0}):
        with pytest.raises(SmeltError, match=f"{next(iter(wrong))} must be"):
            PresetPass(**wrong)
