"""Reranking, beams, contrasted prompts and cascades: each equals a loop that reads whole texts, and greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch

import smelt
from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.choice import Against, Beam, Cascade, Cautious, ChoicePlan, Rerank, Search
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.passes import Samples
from smelt.passes.decode.skip import Skip
from smelt.passes.sample.cascade import Cascade as CascadePass
from smelt.passes.sample.rerank import Rerank as RerankPass
from smelt.passes.sample.rerank import learned, observed, regression
from smelt.runtime.sampling import Sampling
from smelt.runtime.search.cascade import Drawn
from smelt.runtime.search.make import writer
from smelt.runtime.session import Session
from smelt.runtime.writer import Limits

from .. import tiny
from ..ir.programs import cached, captured

Law = Callable[..., torch.Tensor]
NEW = 6
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2], [7, 1, 8, 2, 8, 1, 8]]
WARM = Sampling(temperature=1.0, seed=4)
UNSURE = Cautious(3, 0.0, 0.5, 3)
CODED: dict[str, Any] = {"tail": 4, "page": 4, "keys": Affine(8, 4, "channel"), "values": Affine(8, 16)}


@cache
def program(coded: bool) -> Program:
    made = cached(captured("llama"), dense="float32", **(CODED if coded else {}))
    Skip(layers=(1,)).apply(made, None)
    verify(made)
    return made


@cache
def plan(coded: bool = False) -> Plan:
    return lower(program(coded).fork(), "torch")


def written(
    search: Search | None,
    sampling: Sampling = Sampling(),  # noqa: B008  # frozen
    prompts: Sequence[list[int]] = PROMPTS,
    eos: Sequence[int] = (),
    coded: bool = False,
    **options: Any,
) -> Any:
    made = plan(coded)
    made.program.choice = None if search is None else ChoicePlan(search=search)
    session = Session(made, len(prompts), max(map(len, prompts)) + NEW + 4)
    out = writer(session, prompts, sampling, Limits(NEW, frozenset(eos)), **options)
    yielded: list[list[int]] = [[] for _ in prompts]
    for number, fresh in out.run():
        yielded[number] += fresh
    assert yielded == [row.tokens for row in out.rows] and all(row.done for row in out.rows)
    return out


def tokens(*args: Any, **options: Any) -> list[list[int]]:
    return [row.tokens for row in written(*args, **options).rows]


@cache
def _whole(ids: tuple[int, ...]) -> torch.Tensor:
    inputs = {"tokens": torch.tensor([ids]), "positions": torch.arange(len(ids))[None]}
    return interpret(captured("llama"), inputs)["logits"][0, -1].double().log_softmax(-1)


def whole(prompt: Sequence[int], text: Sequence[int] = (), more: Sequence[int] = ()) -> torch.Tensor:
    """Log probabilities behind a text, without a cache."""
    return _whole((*prompt, *text, *more))


@cache
def _stepped(prompt: tuple[int, ...], text: tuple[int, ...], more: tuple[int, ...]) -> torch.Tensor:
    session = Session(plan(coded=True), 1, 40)
    logits = session.prefill([prompt])["logits"]
    for token in text:
        logits = session.step(torch.tensor([[token]]), torch.tensor([session.cache.lengths]))["logits"][:, -1]
        session.cache.commit([[0]])
    if more:
        positions = torch.arange(len(more))[None] + session.cache.lengths[0]
        logits = session.step(torch.tensor([more]), positions)["logits"][:, -1]
    return logits[0].double().log_softmax(-1)


def stepped(prompt: Sequence[int], text: Sequence[int] = (), more: Sequence[int] = ()) -> torch.Tensor:
    """The same through a cache of 4-bit pages, token by token; of `more` nothing is stored."""
    return _stepped(tuple(prompt), tuple(text), tuple(more))


LAWS: list[Any] = [pytest.param(False, whole, id="dense"), pytest.param(True, stepped, id="coded")]


def entropy(law: torch.Tensor) -> float:
    return float(-(law.exp() * law).sum())


def naive_rerank(law: Law, search: Rerank, prompt: list[int], eos: Sequence[int] = ()) -> list[int]:
    text: list[int] = []
    while len(text) < NEW and not (text and text[-1] in eos):
        here = law(prompt, text)
        found = {}
        for token in here.topk(search.candidates if entropy(here) >= search.threshold else 1).indices.tolist():
            trial, scores = [token], [float(here[token])]
            while len(trial) <= search.length and trial[-1] not in eos:
                ahead = law(prompt, text, trial)
                trial.append(int(ahead.argmax()))
                scores.append(float(ahead.max()))
            found[token] = sum(scores) / len(scores)
        text.append(max(found, key=lambda token: found[token]))
    return text


def typical(prompts: Sequence[list[int]]) -> float:
    """An entropy that about half of the laws on the way reach."""
    ways = zip(prompts, tokens(None), strict=True)
    found = [entropy(whole(prompt, way[:at])) for prompt, way in ways for at in range(NEW)]
    return sorted(found)[len(found) // 2]


@pytest.mark.parametrize(("coded", "law"), LAWS)
def test_reranking_equals_a_loop_over_whole_texts(coded: bool, law: Law) -> None:
    search = Rerank(typical(PROMPTS), 2, 3)
    made = written(search, coded=coded)
    wanted = [naive_rerank(law, search, prompt) for prompt in PROMPTS]
    assert [row.tokens for row in made.rows] == wanted
    always, shorter = Rerank(0.0, 2, 3), Rerank(0.0, 2, 1)
    assert wanted != tokens(None, coded=coded) and tokens(always, coded=coded) != tokens(shorter, coded=coded)
    assert made.counts.steps < written(always, coded=coded).counts.steps  # what is sure costs no step of its own
    end = wanted[0][3]
    cut = [naive_rerank(law, search, prompt, (end,)) for prompt in PROMPTS]
    assert tokens(search, coded=coded, eos=(end,)) == cut != wanted


@pytest.mark.parametrize("search", [Rerank(math.inf, 3, 4), Rerank(0.0, 1, 4), Beam(1, 1), Against(0.0)], ids=str)
def test_without_their_options_they_are_greedy(search: Search) -> None:
    assert tokens(search, coded=True) == tokens(None, coded=True)


def naive_beams(law: Law, search: Beam, prompt: list[int], eos: Sequence[int] = ()) -> list[list[int]]:
    """All texts that are found, best first."""
    groups: list[dict[str, Any]] = [{"live": [((), 0.0)], "ended": []} for _ in range(search.groups)]

    def value(text: tuple[tuple[int, ...], float]) -> float:
        return text[1] / len(text[0]) ** search.alpha

    for _ in range(NEW):
        used = [0] * 97
        for group in groups:
            best = sorted(group["ended"], key=value, reverse=True)[: search.beams]
            if len(best) == search.beams and value(best[-1]) >= max(map(value, group["live"] or best[-1:])):
                group["live"] = []
            cells = [
                ((*text, token), score + float(more), score + float(more) - search.diversity * used[token])
                for text, score in group["live"]
                for token, more in enumerate(law(prompt, text))
            ]
            cells.sort(key=lambda cell: -cell[2])
            group["ended"] += [cell[:2] for cell in cells[: search.beams] if cell[0][-1] in eos]
            group["live"] = [cell[:2] for cell in cells if cell[0][-1] not in eos][: search.beams]
            for text, _ in group["live"]:
                used[text[-1]] += 1
    for group in groups:
        group["ended"] = sorted(group["ended"] + group["live"], key=value, reverse=True)[: search.beams]
    found = sorted((text for group in groups for text in group["ended"]), key=value, reverse=True)
    return [list(text) for text, _ in found]


@pytest.mark.parametrize(
    ("search", "coded", "law"), [(Beam(3, 1), False, whole), (Beam(2, 2, 0.8, 0.5), True, stepped)], ids=["one", "two"]
)
def test_beams_equal_a_search_over_whole_texts(search: Beam, coded: bool, law: Law) -> None:
    for eos in ((), tuple(range(0, 97, 9))):
        made = written(search, coded=coded, eos=eos)
        wanted = [naive_beams(law, search, prompt, eos) for prompt in PROMPTS]
        assert [list(map(list, made.texts(number))) for number in range(len(PROMPTS))] == wanted
        assert [row.tokens for row in made.rows] == [texts[0] for texts in wanted]
    assert tokens(search, coded=coded) != tokens(None, coded=coded)


def test_groups_without_a_penalty_are_one_plain_search_and_differ_with_one() -> None:
    one, alike, apart = (written(search) for search in (Beam(2, 1), Beam(2, 3, 0.0), Beam(2, 3, 4.0)))
    for number in range(len(PROMPTS)):
        assert sorted(alike.texts(number)) == sorted(one.texts(number) * 3)
        assert len(set(apart.texts(number))) == 6


def naive_against(law: Law, search: Against, prompt: list[int], other: list[int]) -> list[int]:
    text: list[int] = []
    for _ in range(NEW):
        own, noise = law(prompt, text), law(other, text)
        p = own.exp()
        score = own * (1 + search.weight * search.amplify) - search.weight * noise
        score[p < search.floor * p.max()] = -math.inf
        deviation = math.sqrt(float(((p - p.mean()) ** 2).mean()))
        unsure = 1 - deviation * math.sqrt(len(p)) >= search.uncertainty
        text.append(int((score if unsure else own).argmax()))
    return text


@pytest.mark.parametrize(("coded", "law"), LAWS)
def test_contrast_equals_a_loop_over_both_texts(coded: bool, law: Law) -> None:
    others = [[5, 6], [7], [8, 9, 10]]
    for search in (Against(0.7), Against(2.0, True, 0.5, 0.8)):
        wanted = [naive_against(law, search, *both) for both in zip(PROMPTS, others, strict=True)]
        assert tokens(search, coded=coded, against=others) == wanted != tokens(None, coded=coded)
    ends = [naive_against(law, Against(0.7, keep=2), prompt, prompt[-2:]) for prompt in PROMPTS]
    assert tokens(Against(0.7, keep=2), coded=coded) == ends


@pytest.mark.parametrize("search", [Against(0.0), Against(0.9, uncertainty=1.1), Against(0.9, True, keep=99)], ids=str)
def test_a_law_without_contrast_stays_as_it_is(search: Against) -> None:
    """No weight, never unsure, or twice the same prompt."""
    assert tokens(search, WARM, coded=True) == tokens(None, WARM, coded=True)


def test_a_cascade_is_either_model_alone_or_both_by_how_sure_the_small_one_was() -> None:
    for coded in (False, True):
        for sampling in (Sampling(), WARM):
            draft = lower(program(coded).draft, "torch")  # type: ignore[arg-type]  # there is one
            small = writer(Session(draft, len(PROMPTS), 30), PROMPTS, sampling, Limits(NEW))
            assert [*small.run()]
            small_rows, large = [row.tokens for row in small.rows], tokens(None, sampling, coded=coded)
            assert tokens(Cascade(-math.inf), sampling, coded=coded) == small_rows != large
            assert tokens(Cascade(1.0), sampling, coded=coded) == large
    scores = []
    for prompt, row in zip(PROMPTS, tokens(Cascade(-math.inf)), strict=True):
        session = Session(lower(program(False).draft, "torch"), 1, 40)  # type: ignore[arg-type]
        logits = [session.prefill([prompt])["logits"][0].clone()]
        positions = torch.arange(len(prompt), len(prompt) + NEW - 1)[None]
        logits += [*session.step(torch.tensor([row[:-1]]), positions)["logits"][0]]
        laws = torch.stack(logits).log_softmax(-1)
        scores.append(float(laws[range(NEW), row].quantile(0.25)))
    middle = sorted(scores)[1]
    small_rows, large = tokens(Cascade(-math.inf)), tokens(None)
    answers = zip(small_rows, large, scores, strict=True)
    mixed = [small if score >= middle - 1e-4 else big for small, big, score in answers]
    assert tokens(Cascade(middle - 1e-4, 0.25)) == mixed and small_rows != mixed != large


@pytest.mark.parametrize("search", [Rerank(0.0, 2, 3), Beam(2, 2), Against(0.7), Cascade(-4.0)], ids=str)
def test_a_row_does_not_depend_on_its_batch(search: Search) -> None:
    assert tokens(search, prompts=PROMPTS[:1], coded=True) == tokens(search, coded=True)[:1]


def test_a_threshold_is_learned_apart_from_where_it_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    entropies = 6 * torch.rand(200, 64, generator=generator, dtype=torch.float64)
    sure = (3 * (2.0 - entropies)).sigmoid()
    first = torch.rand(200, 64, generator=generator, dtype=torch.float64) < sure
    threshold, notes = learned(entropies, first)
    assert abs(threshold - 2.0) < 0.15 and abs(notes["accuracy"] - float(torch.maximum(sure, 1 - sure).mean())) < 0.01
    _, swapped = learned(entropies, torch.cat([first[:160], ~first[160:]]))
    assert abs(swapped["accuracy"] - (1 - notes["accuracy"])) < 1e-3  # the last part had no say in the threshold
    offset, slope = regression(entropies.flatten(), first.flatten().double())
    assert abs(slope + 3) < 0.15 and abs(offset - 6) < 0.3
    for wrong, says in ((torch.ones_like(first), "always right or always wrong"), (~first, "does not tell")):
        with pytest.raises(SmeltError, match=says):
            learned(entropies, wrong)


def test_reranking_learns_from_text_or_is_told() -> None:
    made, told = program(False).fork(), RerankPass(threshold=0.5)
    assert (told.calibration, RerankPass().calibration) == ("none", "text")
    told.apply(made, None)
    assert made.choice == ChoicePlan(search=Rerank(0.5, 3, 5))
    samples = Samples(torch.randint(0, 97, (20, 12), generator=torch.Generator().manual_seed(1)))
    entropies, first = observed(program(False), samples, 48)
    assert entropies.shape == first.shape == (4, 11)
    for at in (0, 10):
        law = whole(samples.tokens[2, : at + 1].tolist())
        assert abs(float(entropies[2, at]) - entropy(law)) < 1e-5
        assert bool(first[2, at]) == (int(law.argmax()) == int(samples.tokens[2, at + 1]))
    for text, says in ((None, "pass calibration texts to compile, or set threshold"), (samples, "parted in five")):
        with pytest.raises(SmeltError, match=says):
            RerankPass(tokens=48).apply(made, text)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (partial(Rerank, threshold=math.nan), "threshold is 0 or above"),
        (partial(Beam, groups=0), "groups count from 1"),
        (partial(Against, keep=0), "keep counts from 1"),
        (partial(Cascade, quantile=2.0), "quantile is between 0 and 1"),
        (partial(written, None, against=[[1]]), "against is for programs that contrast prompts"),
        (partial(written, Against(), against=[[1]]), "3 prompts need as many others"),
        (partial(written, Against(), against=[[1], [], [2]]), "against 1 must hold a token"),
        (partial(written, Against(), against=[[1], [1] * 200, [2]]), "against 1 has 200 tokens and 6 come behind it"),
    ],
)
def test_what_means_nothing_is_refused(search: Callable[[], Any], says: str) -> None:
    with pytest.raises(SmeltError, match=says):
        search()


def test_a_draft_model_of_a_shorter_context_is_refused_where_the_answer_does_not_fit() -> None:
    made = plan().program.fork()
    assert made.draft is not None
    made.choice = ChoicePlan(search=Cascade())
    made.draft.facts["context"] = len(PROMPTS[0]) + NEW - 1
    lowered = lower(made, "torch")
    assert writer(Session(lowered, 1, 40), PROMPTS[:1], Sampling(), Limits(NEW))
    with pytest.raises(SmeltError, match="draft model prompt 0 has 12 tokens and 7 come behind it, but the context of"):
        writer(Session(lowered, 1, 40), PROMPTS[:1], Sampling(), Limits(NEW + 1))


def test_a_cascade_needs_a_draft_model() -> None:
    assert ["must have a draft model" in why for why in CascadePass().requires(cached(captured("llama")))] == [True]
    assert not [*CascadePass().requires(program(False))]
    held = program(False).fork()
    held.choice = ChoicePlan(constrain="align")
    assert ["by align, and a search by mask" in why for why in CascadePass().requires(held)] == [True]


def test_a_cascade_ends_a_small_answer_at_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"cache.insert": {}}, {"decode.skip": {"layers": [1]}}, {"sample.cascade": {"threshold": -1e9}}]
    lm = smelt.compile(str(tiny.model()), {"name": "c", "family": "sample", "does": "Asks.", "steps": steps})
    full = lm.generate("import os", max_new_tokens=12, eos=())
    asked, behind = [], Drawn.choose_behind
    monkeypatch.setattr(Drawn, "choose_behind", lambda self, logits: asked.append(1) or behind(self, logits))
    row = lm.complete(["import os"], max_new_tokens=12, eos=(), stop=[full[8:10]]).rows[0]
    assert (row.text, row.reason) == (full.split(full[8:10])[0], "stop") and len(asked) == len(row.tokens) < 12


@pytest.mark.parametrize("search", [Rerank(0.0, 2, 3), Beam(2, 2), UNSURE], ids=str)
@pytest.mark.parametrize(("read", "bad"), [("prefill", math.nan), ("step", math.inf)])
def test_logits_whose_greatest_is_no_number_are_refused(
    search: Search, read: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(Session, read)

    def broken(self: Session, *args: Any, **options: Any) -> Any:
        outputs = plain(self, *args, **options)
        outputs["logits"][1, ..., 7] = bad
        return outputs

    monkeypatch.setattr(Session, read, broken)
    with pytest.raises(SmeltError, match=r"row \d of the logits, position \d+, holds NaN or inf"):
        written(search, WARM)


def test_a_call_may_bring_the_other_prompt() -> None:
    steps = [{"cache.insert": {"dtype": "float16"}}, {"sample.against": {"weight": 0.8, "keep": 1}}]
    lm = smelt.compile(str(tiny.model()), {"name": "c", "family": "sample", "does": "Contrasts.", "steps": steps})
    options: dict[str, Any] = {"max_new_tokens": 4, "eos": ()}
    both = lm.generate(["import os", "import re"], against="def f(", **options)
    assert both == [lm.generate(text, against=["def f("], **options) for text in ("import os", "import re")]
    assert both != lm.generate(["import os", "import re"], **options)
