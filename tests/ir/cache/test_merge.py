"""Merging: exact where tokens are equal, and against a loop elsewhere; the zero class, weights and multiplicity."""

import pytest
import torch

from smelt.ir.cache.merge import assign, merge, to_merge
from smelt.ir.errors import SmeltError

TOLERANCE = 1e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


K, V, SCORES = random(30, 8, seed=1), random(30, 6, seed=2), random(30, seed=3).exp()
KEPT, MERGED = torch.arange(0, 30, 3), torch.arange(1, 30, 3)


def attend(q, keys, values, bias=0.0):
    return torch.softmax(q @ keys.T + bias, -1) @ values


def naive(threshold=0.0, scores=SCORES, count=None):
    keys, values, many = K[KEPT].clone(), V[KEPT].clone(), []
    unit = K / K.norm(dim=-1, keepdim=True)
    taken = [[int(i)] for i in KEPT]
    for i in MERGED.tolist():
        cosine = unit[i] @ unit[KEPT].T
        if cosine.max() > threshold:
            taken[int(cosine.argmax())].append(i)
    for j, group in enumerate(taken):
        w = scores[group] / scores[group].sum()
        keys[j], values[j] = w @ K[group], w @ V[group]
        many.append(sum(1 if count is None else float(count[i]) for i in group))
    return keys, values, torch.tensor(many).log()


@pytest.mark.parametrize("threshold", [0.0, 0.4, -1.0])
def test_it_computes_score_weighted_means(threshold):
    got, want = merge(K, V, SCORES, KEPT, MERGED, threshold=threshold), naive(threshold)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < TOLERANCE


@pytest.mark.parametrize("wrong", [{"threshold": 0.4}, {"scores": torch.ones(30)}, {"count": torch.full((30,), 1.05)}])
def test_the_comparison_sees_a_wrong_answer(wrong):
    got = merge(K, V, SCORES, KEPT, MERGED)
    assert max(float((a - b).abs().max()) for a, b in zip(got, naive(**wrong), strict=True)) > 100 * TOLERANCE


def test_a_sparse_head_evicts_what_a_spread_one_merges():
    """Of 40 tokens 8 are kept; the others are merged best first, until both hold the part of the score."""
    kept, at = torch.arange(8), torch.arange(40)
    heads = {"sparse": 0.5**at, "spread": 1 - at / 1000}
    for name, scores in heads.items():
        made = to_merge(scores, kept, 1.0, 0.9)
        held = (scores[:8].sum() + scores[made].sum()) / scores.sum()
        assert made.tolist() == list(range(8, 8 + len(made))) and (held >= 0.9 or not len(made))
        assert not len(made) or held - scores[made[-1]] / scores.sum() < 0.9  # not one more than it takes
        assert len(made) == {"sparse": 0, "spread": 28}[name]
        assert to_merge(scores, kept, 1.0, 1.0).tolist() == list(range(8, 40))
        assert to_merge(scores, kept, 0.25).tolist() == list(range(8, 16))  # alike in all heads
    assert len(to_merge(heads["spread"], kept, 0.25, 0.9)) == 8
    assert len(to_merge(heads["spread"].flip(0), kept, 1.0, 0.9)) == 28  # the best of them, wherever they stand
    assert to_merge(torch.zeros(40), kept, 1.0, 0.9).numel() == 0


def test_equal_keys_merge_without_loss():
    """One entry for n equal keys is exact with ln n on its logit, and wrong without."""
    distinct = random(4, 8)
    keys, values = distinct.repeat_interleave(5, 0), random(20, 6, seed=1)
    kept, merged = torch.arange(0, 20, 5), torch.tensor([i for i in range(20) if i % 5])
    made = merge(keys, values, torch.ones(20), kept, merged)
    assert torch.allclose(made.bias.exp(), torch.full((4,), 5.0)) and (made.keys - distinct).abs().max() < TOLERANCE
    q = random(3, 8, seed=2)
    assert (attend(q, *made) - attend(q, keys, values)).abs().max() < TOLERANCE
    uneven = merge(keys, values, torch.ones(20), kept, merged[:6])
    rest = torch.cat([kept, merged[:6]]).sort().values
    assert (attend(q, *uneven) - attend(q, keys[rest], values[rest])).abs().max() < TOLERANCE
    assert (attend(q, uneven.keys, uneven.values) - attend(q, keys[rest], values[rest])).abs().max() > 100 * TOLERANCE


def test_multiplicity_is_carried_on():
    first = merge(K, V, torch.ones(30), KEPT, MERGED, threshold=-1.0, weigh="count")
    assert float(first.bias.exp().sum()) == pytest.approx(20)
    again = merge(
        *first[:2], torch.ones(10), torch.arange(4), torch.arange(4, 10), threshold=-1.0, weigh="count", bias=first.bias
    )
    assert float(again.bias.exp().sum()) == pytest.approx(20)
    total = (again.values * again.bias.exp()[:, None]).sum(0)  # means weighted by count keep the sum of all values
    assert (total - torch.cat([V[KEPT], V[MERGED]]).sum(0)).abs().max() < 1e-5


def test_dissimilar_tokens_go_to_the_zero_class():
    kept = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    away = torch.tensor([[-1.0, -1.0], [2.0, 0.1], [0.1, 5.0], [0.0, 0.0], [1.0, 1.0]])
    assert assign(kept, away).tolist() == [2, 0, 1, 2, 0]
    assert assign(kept, away, 0.8).tolist() == [2, 0, 1, 2, 2]
    assert assign(kept[:0], away).tolist() == [0] * 5
    made = merge(torch.cat([kept, away[:1]]), torch.ones(3, 1), torch.ones(3), torch.tensor([0, 1]), torch.tensor([2]))
    assert torch.equal(made.keys, kept) and (made.bias == 0).all()


def test_values_alone_may_merge():
    made, whole = merge(K, V, SCORES, KEPT, MERGED, values_only=True), merge(K, V, SCORES, KEPT, MERGED)
    assert torch.equal(made.keys, K[KEPT]) and torch.equal(made.values, whole.values)
    assert torch.equal(made.bias, whole.bias)


def test_halves_are_summed_in_float32_and_empty_sets_are_fine():
    made = merge(K.half(), V.half(), SCORES, KEPT, MERGED)
    assert made.keys.dtype is torch.float16 and (made.values.float() - naive()[1]).abs().max() < 4e-3
    alone = merge(K, V, SCORES, KEPT, MERGED[:0])
    assert (alone.keys - K[KEPT]).abs().max() < TOLERANCE and (alone.bias == 0).all()
    assert merge(K, V, SCORES, KEPT[:0], MERGED).keys.shape == (0, 8)


def test_tokens_without_weight_leave_the_center_as_it_is():
    made = merge(K, V, torch.zeros(30), KEPT, MERGED)
    assert torch.equal(made.keys, K[KEPT]) and torch.equal(made.values, V[KEPT])


def test_negative_scores_are_no_weights():
    with pytest.raises(SmeltError, match="negative scores are no weights"):
        merge(K, V, -SCORES, KEPT, MERGED)
    merge(K, V, -SCORES, KEPT, MERGED, weigh="count")
