"""Answers drawn by alignment tend to the model's law given the grammar; those drawn by tests are those of the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from threading import Thread
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.errors import SmeltError
from smelt.ir.text import parse_program, print_program, same_program
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.passes.events import ignore
from smelt.passes.manager import run
from smelt.recipes import load
from smelt.runtime import reject
from smelt.runtime.align import Alignment, Node, Seen
from smelt.runtime.constraint import Constraint
from smelt.runtime.guide import Guide
from smelt.runtime.sampling import Sampling, choose

pytest.importorskip("llguidance")

V = 6  # an end, 0, 1, a, b, c
BINARY = "0(00|11)00|1[01]{4}"  # of five digits; behind a 0 little of the law is left
SAMPLED = Sampling(temperature=1.0)
ASKED = {"regex": r"[a-f]{3,9}(-[0-9]{2}){1,3}"}
PROMPTS = ['result = json.loads("', "def main():\n    return "]


@cache
def spelled() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({"<e>": 0, "0": 1, "1": 2, "a": 3, "b": 4, "c": 5}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<e>"])
    return str(made.to_str())


def model(prefix: Sequence[int]) -> torch.Tensor:
    """Logits [V] that look at all of the prefix."""
    key = sum((token + 1) * 7**place for place, token in enumerate(prefix))
    return 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(key))


def binary(alignment: Alignment | None = None) -> Constraint:
    return Constraint("regex", BINARY, spelled(), V, 0, "mask" if alignment is None else "align", alignment)


def answers(held: Constraint) -> dict[tuple[int, ...], float]:
    """The law of whole answers, by enumeration."""

    def behind(prefix: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], float]]:
        guide = held.guide()
        for place, token in enumerate(prefix):
            guide.shape(model(prefix[:place]))
            guide.take(token)
        if guide.over:
            yield prefix, 1.0
            return
        law = guide.shape(model(prefix)).double().softmax(-1)
        for token in law.nonzero()[:, 0].tolist():
            yield from ((answer, float(law[token]) * share) for answer, share in behind((*prefix, token)))

    return dict(behind(()))


def exact() -> dict[tuple[int, ...], float]:
    """The model's law given the grammar."""
    found = {}
    for answer in answers(binary()):
        found[answer] = math.prod(float(model(answer[:n]).double().softmax(-1)[t]) for n, t in enumerate(answer))
    return {answer: share / sum(found.values()) for answer, share in found.items()}


def distance(a: dict[tuple[int, ...], float], b: dict[tuple[int, ...], float]) -> float:
    assert a.keys() == b.keys() and len(a) == 18
    return sum(abs(a[answer] - b[answer]) for answer in a) / 2


def draw(guide: Guide, request: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while not guide.over:
        logits = SAMPLED.process(guide.shape(model(tokens))[None])
        tokens.append(int(choose(logits, SAMPLED, request, torch.tensor([len(tokens)]))))
        guide.take(tokens[-1])
    guide.close()
    return tuple(tokens)


def test_aligned_answers_tend_to_the_law_given_the_grammar() -> None:
    alignment, wanted = Alignment(), exact()
    held, far = binary(alignment), distance(answers(binary()), wanted)
    distances, drawn = [distance(answers(held), wanted)], []
    for count in (10, 30, 240):
        while len(drawn) < count:
            drawn.append(draw(held.guide(), len(drawn)))
        distances.append(distance(answers(held), wanted))
    assert distances[0] == pytest.approx(far) and far > 0.2
    assert distances == sorted(distances, reverse=True) and distances[2] < 0.01 and distances[3] < 1e-6
    late = drawn[30:]
    counted = {answer: late.count(answer) / len(late) for answer in wanted}
    assert distance(counted, wanted) < 2 * math.sqrt(len(wanted) / (2 * math.pi * len(late))) < far / 2


def test_an_alignment_that_looks_no_further_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hope for the next token alone does not come to the law."""
    monkeypatch.setattr(Node, "reckon", lambda self: setattr(self, "hope", self.share))
    alignment = Alignment()
    for request in range(40):
        draw(binary(alignment).guide(), request)
    assert distance(answers(binary(alignment)), exact()) > 0.05


def test_an_alignment_is_bounded_and_shared() -> None:
    alignment = Alignment(most=40)
    answer = [[Seen(0.5, (n >> place) % 4, 0.1) for place in range(6)] for n in range(64)]
    threads = [Thread(target=lambda: [alignment.learn("one", each) for each in answer]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(alignment) == 40 and alignment.root("one").hope < 1
    alignment.learn("two", answer[0])
    assert len(alignment) == 7 and alignment.root("one").hope == 1 and 0 < alignment.root("two").hope < 1


class Allows(reject.Tested):
    """A grammar of one step."""

    def __init__(self, allowed: Sequence[bool]) -> None:
        super().__init__(None, len(allowed))
        self.flags = allowed

    def admits(self, token: int) -> bool:
        self.tests += 1
        return self.flags[token]


def estimates(allowed: Sequence[bool], logits: torch.Tensor, kind: type[Allows] = Allows) -> torch.Tensor:
    """[V]: the estimate of the share, expected where each token is chosen, over all orders of draws."""
    law, expected = logits.double().softmax(-1).tolist(), torch.zeros(len(allowed), dtype=torch.float64)
    for order in permutations(range(len(allowed))):
        chance, left = 1.0, 1.0
        for token in order:
            chance, left = chance * law[token] / left, left - law[token]
        scores = torch.zeros(len(allowed))
        scores[list(order)] = torch.arange(len(allowed), 0, -1).float()
        guide = kind(allowed)
        chosen = reject._first(guide, scores, logits, 0)
        assert guide.log_weight is not None and guide.tests <= len(allowed)
        expected[chosen] += chance * math.exp(guide.log_weight)
    return expected


@pytest.mark.parametrize("allowed", [(1, 0, 1, 0, 0, 1), (0, 0, 0, 1, 0, 0), (1, 1, 1, 1, 1, 1)])
def test_weights_are_those_of_the_law_given_the_grammar(allowed: tuple[int, ...]) -> None:
    """A chosen token has on the average the weight of its own probability, so that all of them have Z together."""
    logits = model((1, 2))
    wanted = logits.double().softmax(-1) * torch.tensor(allowed)
    assert torch.allclose(estimates([bool(each) for each in allowed], logits), wanted, atol=1e-12)


def test_a_weight_that_does_not_look_ahead_is_caught() -> None:
    class Blind(Allows):
        def admits(self, token: int) -> bool:
            known, self.found = getattr(self, "found", False), getattr(self, "found", False) or self.flags[token]
            return known or self.flags[token]

    logits = model((1, 2))
    wanted = float(logits.double().softmax(-1)[[0, 2, 5]].sum())
    assert float(estimates([True, False, True, False, False, True], logits, Blind).sum()) > 1.05 * wanted


def test_equal_scores_come_by_id_however_few_are_sorted() -> None:
    scores = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(3)).float()
    scores[scores < 2] = -math.inf
    wanted = scores.sort(descending=True, stable=True).indices[: int((scores > -math.inf).sum())]
    assert list(reject._order(scores)) == wanted.tolist()


@cache
def compiled() -> Compiled:
    """4-bit weights behind KIVI's cache, with drafts."""
    drafts = [{"decode.recycle": {"nodes": 7}}, {"decode.lookup": {"tokens": 4}}]
    steps = [{"weights.quantize": {"bits": 4}}, {"include": "kivi"}, *drafts]
    recipe = {"name": "drafting", "family": "deploy", "does": "Drafts.", "steps": steps}
    return smelt.compile(str(smelt.reference_model()), recipe)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2}])
def test_tests_choose_what_the_mask_chooses(options: dict[str, Any]) -> None:
    """To the token, with drafts and without, and with few tests."""
    common = {"max_new_tokens": 40, **ASKED, **options}
    masked = compiled().complete(PROMPTS, **common)
    for speculate in (True, False):
        writer, _, _ = compiled()._start(PROMPTS, {**common, "constrain": "reject", "speculate": speculate})
        for _ in writer.run():
            pass
        assert [row.tokens for row in writer.rows] == [row.tokens for row in masked.rows]
        guides: Any = writer._guides
        assert all(0 < guide.tests < 4096 / 4 * len(row.tokens) for guide, row in zip(guides, writer.rows, strict=True))
        weights = [writer.log_weight(number) for number in range(len(PROMPTS))]
        assert all(weight is not None and weight < 0 for weight in weights) if options else weights == [None, None]


def test_aligned_answers_are_the_same_with_drafts() -> None:
    alignments = Alignment(), Alignment()
    for seed in range(3):
        made, plain = (
            compiled().complete(
                PROMPTS * 2, max_new_tokens=12, constrain=held, speculate=speculate, temperature=1.0, seed=seed, **ASKED
            )
            for held, speculate in zip(alignments, (True, False), strict=True)
        )
        assert [row.tokens for row in made.rows] == [row.tokens for row in plain.rows]
    assert len(alignments[0]) == len(alignments[1]) > 20 and len(compiled().alignment) == 0


@pytest.mark.parametrize(("name", "held"), [("asap", "align"), ("awrs", "reject")])
def test_recipes_say_how_answers_are_held(name: str, held: str) -> None:
    under = compiled()
    steps = [step for step in load(name, catalogue()).steps if step.name != "cache.insert"]
    lm = Compiled(run(under.program, steps, None, ignore, None).program, {}, under.assets)
    assert same_program(parse_program(print_program(lm.program), lm.program.weights), lm.program) is None
    said = lm.complete(PROMPTS, max_new_tokens=8, **ASKED)
    asked = under.complete(PROMPTS, max_new_tokens=8, temperature=1.0, constrain=held, **ASKED)
    masked = lm.complete(PROMPTS, max_new_tokens=8, constrain="mask", **ASKED)
    assert said.rows == asked.rows and [row.tokens for row in said.rows] == [row.tokens for row in masked.rows]
    assert len(lm.alignment) == len(under.alignment) and (len(lm.alignment) > 8) == (held == "align")
    under.alignment = Alignment()
    assert lm.generate(PROMPTS[0], max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"constrain": "align"}, "constrain is of a constraint: give one of json_schema, regex, grammar with it"),
        ({"constrain": "perhaps", **ASKED}, "constrain is mask, align .* or reject, not 'perhaps'"),
        ({"constrain": "reject", "temperature": 1.0, "top_p": 0.9, **ASKED}, "draws from the whole law"),
    ],
)
def test_what_cannot_be_held_is_said(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SmeltError, match=says):
        compiled().complete(PROMPTS, **options)
