"""Which tokens are kept: even and adaptive numbers, and centers, deterministic among equals."""

import pytest
import torch

from smelt.ir.cache.choose import adaptive, centers_order, choose
from smelt.ir.errors import SmeltError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lists(indices: list[torch.Tensor]) -> list[list[int]]:
    return [index.tolist() for index in indices]


def test_the_best_are_kept_in_order():
    scores = torch.tensor([[0.1, 3.0, 2.0, 5.0], [9.0, 1.0, 8.0, 2.0]])
    assert lists(choose(scores, 2)) == [[1, 3], [0, 2]]
    assert lists(choose(scores, [3, 0])) == [[1, 2, 3], []]
    assert lists(choose(scores, 4)) == [[0, 1, 2, 3]] * 2


def test_among_equals_the_older_stays():
    scores = torch.zeros(1, 500)
    scores[0, 400] = 1.0
    assert lists(choose(scores, 4)) == [[0, 1, 2, 400]]
    scores[0, 0] = float("nan")
    assert lists(choose(scores, 4)) == [[1, 2, 3, 400]]


def test_heads_share_a_sum_by_score():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0], [4.0, 3.0, 2.0, 1.0, 0.0]])
    assert adaptive(scores, 3, floor=0.0) == [5, 1]
    assert adaptive(scores, 3, floor=0.67) == [4, 2]
    assert adaptive(scores, 3, floor=1.0) == [3, 3]
    assert adaptive(torch.ones(2, 5), 3) == [3, 3]  # equal scores: round the heads
    assert adaptive(scores, 0) == [0, 0] and adaptive(scores, 5) == [5, 5]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7])
def test_adaptive_keeps_the_sum_and_the_most_score(floor):
    scores = random(4, 50).exp() * torch.tensor([[8.0], [1.0], [0.5], [0.01]])
    counts = adaptive(scores, 11, floor)
    assert sum(counts) == 44 and min(counts) >= int(floor * 11) and max(counts) > 11
    kept = sum(float(scores[g, index].sum()) for g, index in enumerate(choose(scores, counts)))
    assert kept > sum(float(scores[g, index].sum()) for g, index in enumerate(choose(scores, 11)))
    if floor == 0.0:
        assert kept == pytest.approx(float(scores.flatten().sort(descending=True).values[:44].sum()))


def test_centers_are_the_greedy_ones():
    keys = random(2, 40, 5)
    for head, order in enumerate(centers_order(keys, 9).tolist()):
        want = [int(keys[head].norm(dim=-1).argmax())]
        while len(want) < 9:
            want.append(int(torch.cdist(keys[head], keys[head, want]).amin(-1).argmax()))
        assert order == want


def test_centers_find_every_cluster_and_no_token_twice():
    keys = torch.randn(1, 6, 8).repeat_interleave(7, 1)  # six points, seven times each
    found = centers_order(keys, 6)[0]
    assert sorted((found // 7).tolist()) == list(range(6)) and (found % 7 == 0).all()
    assert sorted(centers_order(keys, 42)[0].tolist()) == list(range(42))


def test_impossible_numbers_are_refused():
    scores = torch.zeros(2, 5)
    with pytest.raises(SmeltError, match=r"2 heads of 5 tokens cannot keep \[6, 6\]"):
        choose(scores, 6)
    with pytest.raises(SmeltError, match=r"cannot keep \[1\]"):
        choose(scores, [1])
    with pytest.raises(SmeltError, match=r"with a floor of 1\.5"):
        adaptive(scores, 2, 1.5)
    with pytest.raises(SmeltError, match="have no 6 centers"):
        centers_order(torch.zeros(2, 5, 3), 6)
