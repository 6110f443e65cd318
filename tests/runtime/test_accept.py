"""Rules of acceptance: their laws by exact enumeration over all drafts, and wrong rules that this catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from typing import Any

import pytest
import torch

from smelt.ir.decode import Merge, Near, Typical
from smelt.runtime import accept
from smelt.runtime.accept import (
    KSequentialTaker,
    Merger,
    NearTaker,
    Rejecter,
    Standing,
    Truster,
    Trying,
    TypicalTaker,
    Walker,
)
from smelt.runtime.sampling import Sampling
from smelt.runtime.trees import Below

EXACT = 1e-12
INSTANCES = 40


def laws(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A model's law and a drafter's, sometimes with tokens that one of them never gives."""
    random = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(size, generator=random, dtype=torch.float64) ** 3 for _ in "pq")
    if seed % 3 == 0:
        p[seed % size] = 0.0
    if seed % 4 == 0:
        q[(seed + 1) % size] = 0.0
    return p / p.sum(), q / q.sum()


def drawn(proposal: str, q: torch.Tensor, k: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every list of k children with its probability."""
    size = len(q)
    for tokens in product(range(size), repeat=k) if proposal == "iid" else permutations(range(size), k):
        share, left = 1.0, 1.0
        for token in tokens:
            share *= float(q[token]) / left if left > 1e-15 else 0.0
            left -= float(q[token]) if proposal == "distinct" else 0.0
        if share:
            yield share, tokens


def emitted(rule: Trying, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """The law of what a rule emits for given children, and how probably it is one of them."""
    out, reached = torch.zeros_like(p), 1.0
    taken, rest = rule.trials(p, tokens, q)
    for token, share in zip(tokens, taken, strict=True):
        out[token] += reached * share
        reached *= 1 - share
    accepted = 1 - reached
    return (out + reached * rest / rest.sum() if reached > 1e-15 else out), accepted


def whole(rule: Trying, proposal: str, seed: int, k: int) -> tuple[float, float]:
    """Total variation between a rule's law and the model's over every draft, and the acceptance."""
    p, q = laws(seed, 3 + seed % 3)
    k = min(k, int((q > 0).sum())) if proposal == "distinct" else k
    law, accepted = torch.zeros_like(p), 0.0
    for share, tokens in drawn(proposal, q, k):
        out, taken = emitted(rule, p, tokens, q)
        law, accepted = law + share * out, accepted + share * taken
    return float((law - p).abs().sum() / 2), accepted


@pytest.mark.parametrize("proposal", ["iid", "distinct"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rejection_has_the_models_law(proposal: Any, k: int) -> None:
    assert max(whole(Rejecter(proposal), proposal, seed, k)[0] for seed in range(INSTANCES)) < EXACT


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_sequential_selection_has_the_models_law_and_reaches_its_bound(k: int) -> None:
    for seed in range(INSTANCES):
        variation, accepted = whole(KSequentialTaker(), "iid", seed, k)
        p, q = laws(seed, 3 + seed % 3)
        rho = accept.fixed_point(p, q, k)
        beta = float(torch.minimum(q, p / rho).sum())
        assert variation < EXACT and accepted == pytest.approx(1 - (1 - beta) ** k, abs=1e-9)
        assert 1 <= rho <= k and (k > 1 or rho == 1)


def test_one_draft_is_accepted_as_often_as_can_be() -> None:
    for seed in range(INSTANCES):
        p, q = laws(seed, 3 + seed % 3)
        _, accepted = whole(Rejecter("iid"), "iid", seed, 1)
        assert accepted == pytest.approx(1 - float((p - q).abs().sum() / 2))


def test_fixed_children_are_accepted_with_their_probability() -> None:
    for seed in range(INSTANCES):
        p, _ = laws(seed, 5)
        law, accepted = emitted(Rejecter("fixed"), p, [3, 1, 4], None)
        assert float((law - p).abs().max()) < EXACT and accepted == pytest.approx(float(p[[3, 1, 4]].sum()))


def test_merging_stays_within_its_bound_and_can_reach_far() -> None:
    neighbours = torch.tensor([[1, 2], [0, 2], [3, 1], [2, 4], [3, 2]], dtype=torch.int32)
    worst = 0.0
    for seed in range(INSTANCES):
        for delta, tokens in product((0.1, 0.3), ([2], [0, 3], [4, 1, 0])):
            p, _ = laws(seed, 5)
            law, _ = emitted(Merger(Merge(delta), {"neighbours": neighbours}), p, tokens, None)
            variation = float((law - p).abs().sum() / 2)
            assert variation <= delta * len(tokens) + EXACT
            worst = max(worst, variation / (delta * len(tokens)))
    assert worst > 0.5  # a bound that nothing comes near would say nothing


class RowWise(Trying):
    """Each candidate row draws a token of its own, and a failed draw is thrown away: as in released code."""

    def trials(self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None) -> Any:
        return [float(p[token]) for token in tokens], p


class SoftScore(Trying):
    """The likeliest token of the draft, scored as if it had been drawn from its law: as in released code."""

    def trials(self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None) -> Any:
        assert q is not None
        return Rejecter("iid").trials(p, [int(q.argmax())] * len(tokens), q)


WRONG: dict[str, Callable[[int], float]] = {
    "a draw of its own for each row": lambda seed: _fixed(RowWise(), seed),
    "independent draws as if distinct": lambda seed: whole(Rejecter("distinct"), "iid", seed, 2)[0],
    "distinct draws as if independent": lambda seed: whole(Rejecter("iid"), "distinct", seed, 2)[0],
    "the best child with a soft law": lambda seed: _argmax(seed),
    "distinct draws in k-sequential selection": lambda seed: whole(KSequentialTaker(), "distinct", seed, 2)[0],
}


def _fixed(rule: Trying, seed: int) -> float:
    p, _ = laws(seed, 4)
    return float((emitted(rule, p, [0], None)[0] - p).abs().sum() / 2)


def _argmax(seed: int) -> float:
    p, q = laws(seed, 4)
    best = [int(q.argmax())]
    return float((emitted(Rejecter("iid"), p, best, q)[0] - p).abs().sum() / 2)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_enumeration_catches_wrong_rules(wrong: str) -> None:
    assert max(WRONG[wrong](seed) for seed in range(INSTANCES)) > 0.02


def test_drawn_children_may_be_taken_as_fixed_and_are_accepted_less() -> None:
    """Given its children any draft is fixed, so that this loses acceptance and never the law."""
    pairs = [(whole(Rejecter(rule), "iid", seed, 1)) for seed in range(INSTANCES) for rule in ("fixed", "iid")]
    assert max(variation for variation, _ in pairs) < EXACT
    assert all(fixed[1] <= drawn[1] + EXACT for fixed, drawn in zip(pairs[::2], pairs[1::2], strict=True))


def standing(logits: torch.Tensor, rows: int, sampling: Sampling) -> Standing:
    """Rows at the same node, each a request of its own."""
    at = torch.arange(rows)
    return Standing(sampling.process(logits.expand(rows, -1)), sampling, at, torch.full((rows,), 7))


def frequencies(rule: Any, logits: torch.Tensor, below: Below, rows: int = 4000) -> torch.Tensor:
    at = standing(logits, rows, Sampling(temperature=1.0, seed=3))
    came = rule.behind(at, [below] * rows, [[0]] * rows)
    nodes = dict(zip(below.tokens, below.nodes, strict=True))
    assert all(node is None or nodes[token] == node for token, node in came)
    return torch.bincount(torch.tensor([token for token, _ in came]), minlength=len(logits)) / rows


def test_draws_follow_the_law() -> None:
    """Coins and the draw behind refusals are independent of each other: the joint law comes out."""
    logits = torch.tensor([0.3, -0.2, 1.1, 0.0])
    p = logits.double().softmax(-1)
    q = torch.tensor([0.1, 0.5, 0.2, 0.2])
    below = Below([1, 2], [4, 5], None)
    assert (frequencies(Rejecter("fixed"), logits, below) - p).abs().max() < 0.03
    for token in (1, 2):
        one = Below([token], [4], q)
        want = emitted(Rejecter("iid"), p, [token], q.double())[0]
        assert (frequencies(Rejecter("iid"), logits, one) - want).abs().max() < 0.03


def test_greedy_rules_take_the_likeliest_token() -> None:
    logits, below = torch.tensor([0.3, -0.2, 1.1, 0.0]), Below([1, 2], [4, 5], torch.tensor([0.1, 0.5, 0.2, 0.2]))
    at = standing(logits, 1, Sampling())
    for rule in (Walker(), Rejecter("fixed"), Rejecter("iid"), Rejecter("distinct"), KSequentialTaker()):
        assert rule.behind(at, [below], [[0]]) == [(2, 5)], rule
    nothing = Below([], [], None)
    for rule in (Walker(), Rejecter("iid"), KSequentialTaker()):
        assert rule.behind(at, [nothing], [[0]]) == [(2, None)], rule


def test_typical_acceptance_takes_what_is_likely_enough() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    at = standing(logits, 1, Sampling(temperature=1.0))
    below = Below([3, 1], [4, 5], None)
    assert TypicalTaker(Typical()).behind(at, [below], [[0]]) == [(1, 5)]
    low = TypicalTaker(Typical(epsilon=0.04, alpha=0.9)).behind(at, [Below([3], [4], None)], [[0]])
    assert low == [(3, 4)]
    refused = TypicalTaker(Typical()).behind(at, [Below([3], [4], None)], [[0]])
    assert refused == Walker().behind(at, [Below([3], [4], None)], [[0]])


def test_near_acceptance_counts_ranks_and_regret() -> None:
    logits = torch.tensor([2.0, 1.7, 1.0, 0.0])
    at, below = standing(logits, 1, Sampling()), Below([2, 1], [4, 5], None)
    assert NearTaker(Near()).behind(at, [below], [[0]]) == [(0, None)]
    assert NearTaker(Near(top=2)).behind(at, [below], [[0]]) == [(1, 5)]
    assert NearTaker(Near(top=2)).behind(at, [Below([2], [4], None)], [[0]]) == [(0, None)]
    rule = NearTaker(Near(regret=0.5))
    assert rule.behind(at, [below], [[0]]) == [(1, 5)]
    assert rule.behind(at, [below], [[0, 5]]) == [(0, None)]  # 0.3 was lost on the way already
    assert rule.behind(at, [below], [[0]]) == [(1, 5)]  # a new step


def test_what_may_not_stand_somewhere_is_never_accepted() -> None:
    """A constraint takes tokens out of the law; no rule brings them back, whatever was drafted."""
    logits = torch.tensor([0.3, -torch.inf, 1.1, 0.0])
    below, sampled = Below([1], [4], torch.tensor([0.1, 0.5, 0.2, 0.2])), Sampling(temperature=1.0, seed=3)
    neighbours = torch.tensor([[1, 2], [0, 2], [3, 1], [2, 0]], dtype=torch.int32)
    rules = [
        Walker(), Rejecter("fixed"), Rejecter("iid"), KSequentialTaker(), TypicalTaker(Typical()), Truster(),
        NearTaker(Near(top=4, regret=9.0)), Merger(Merge(0.9), {"neighbours": neighbours}),
    ]  # fmt: skip
    for rule in rules:
        for sampling in (Sampling(), sampled):
            came = rule.behind(standing(logits, 200, sampling), [below] * 200, [[0]] * 200)
            assert all(token != 1 and node is None for token, node in came), rule
