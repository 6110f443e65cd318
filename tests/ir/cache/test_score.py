"""Scores of stored tokens, against loops over single queries and keys; every option has a wrong answer that shows."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from smelt.ir.cache import score as score_module
from smelt.ir.cache.choose import centers_order, choose
from smelt.ir.cache.score import Score, column_mass, scores, uniform
from smelt.ir.errors import SmeltError

TOLERANCE = 2e-6  # float32, sums of some thirty shares below one
H, G, N, S, D = 4, 2, 7, 20, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q, K, V = random(H, N, D, seed=1), random(G, S, D, seed=2), random(G, S, D, seed=3)
Q_AT = torch.arange(S - N, S)
K_AT = torch.stack([torch.arange(S), torch.tensor([0, *range(2, S + 1)])])  # head 1 lost a token: its last is unseen
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def naive(scale=0.3, window=None, softcap=None, sinks=None, normalize="none", reduce="mean", queries=range(N), q=Q):
    """Mass [G, S] in Python floats."""
    out = torch.zeros(G, H // G, S)
    seen = torch.zeros(G, S)
    for h in range(H):
        g = h // (H // G)
        for i in queries:
            at = int(Q_AT[i])
            near = [s for s in range(S) if 0 <= at - int(K_AT[g, s]) < (window or 10**9)]
            logits = {
                s: scale * sum(a * b for a, b in zip(q[h, i].tolist(), K[g, s].tolist(), strict=True)) for s in near
            }
            if softcap:
                logits = {s: softcap * math.tanh(x / softcap) for s, x in logits.items()}
            total = sum(map(math.exp, logits.values())) + (math.exp(sinks[h]) if sinks is not None else 0.0)
            for s, x in logits.items():
                out[g, h % (H // G), s] += math.exp(x) / total * (len(near) if normalize == "length" else 1)
                seen[g, s] += h % (H // G) == 0
    if normalize == "count":
        out /= seen.clamp(min=1)[:, None]
    return out.amax(1) if reduce == "max" else out.sum(1) if reduce == "sum" else out.mean(1)


OPTIONS = [
    {},
    {"window": 9},
    {"softcap": 2.0},
    {"sinks": SINKS},
    {"normalize": "count"},
    {"normalize": "length"},
    {"reduce": "max"},
    {"reduce": "sum"},
    {"window": 11, "softcap": 3.0, "sinks": SINKS, "normalize": "length", "reduce": "max"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block", [N, 1, 3])
def test_column_mass_is_the_sum_of_probabilities(options, block, monkeypatch):
    monkeypatch.setattr(score_module, "LOGITS", block * H * S)
    got = column_mass(Q, K, Q_AT, K_AT, 0.3, **options)
    assert got.shape == (G, S) and (got - naive(**options)).abs().max() < TOLERANCE * (
        S if "normalize" in options else 1
    )


@pytest.mark.parametrize("wrong", [{"scale": 0.315}, {"window": 10}, {"queries": range(1, N)}, {"normalize": "count"}])
def test_the_comparison_sees_a_wrong_answer(wrong):
    want = naive(**({"window": 9} | wrong))
    assert (column_mass(Q, K, Q_AT, K_AT, 0.3, 9) - want).abs().max() > 100 * TOLERANCE


def test_long_prompts_go_through_in_blocks(monkeypatch):
    whole, sizes = column_mass(Q, K, Q_AT, K_AT, 0.3), []
    real = score_module.probabilities
    monkeypatch.setattr(score_module, "LOGITS", 2 * H * S)
    monkeypatch.setattr(score_module, "probabilities", lambda q, *rest: sizes.append(q.shape[1]) or real(q, *rest))
    assert torch.allclose(column_mass(Q, K, Q_AT, K_AT, 0.3), whole, atol=TOLERANCE) and sizes == [2, 2, 2, 1]


def test_a_query_that_sees_nothing_gives_nothing():
    mass = column_mass(Q[:, :1], K, torch.tensor([-1]), K_AT, 0.3)
    assert (mass == 0).all()
    assert (column_mass(Q[:, :0], K, Q_AT[:0], K_AT, 0.3, normalize="count") == 0).all()


def got(score: Score, **more):
    return scores(score, K, V, K_AT, Q, Q_AT, scale=0.3, **more)


def test_the_newest_queries_are_asked():
    assert (got(Score(queries=3)) - naive(queries=[4, 5, 6])).abs().max() < TOLERANCE
    assert (got(Score(queries=0.1)) - naive(queries=[5, 6])).abs().max() < TOLERANCE  # of 20 tokens
    assert (got(Score()) - naive()).abs().max() < TOLERANCE


def test_probes_are_drawn_by_position_alone():
    score = Score(queries=2, probes=0.4, seed=1)
    drawn = [i for i in range(N) if i >= 5 or uniform(Q_AT, 1)[i] < 0.4]
    assert 2 < len(drawn) < N and (got(score) - naive(queries=drawn)).abs().max() < TOLERANCE
    asked = score.asks(Q_AT, S)
    assert torch.equal(torch.cat([score.asks(Q_AT[:3], S), score.asks(Q_AT[3:], S)]), asked)
    again = scores(score, K, V, K_AT, Q[:, asked], Q_AT[asked], scale=0.3)  # whoever kept only these loses nothing
    assert torch.equal(again, got(score))


def test_the_hash_is_even_and_depends_on_the_seed():
    at = torch.arange(20000)
    for seed in (0, 1, 123456789):
        x = uniform(at, seed)
        assert x.min() >= 0 and x.max() < 1 and abs(float(x.mean()) - 0.5) < 0.01
        assert abs(float((x < 0.05).float().mean()) - 0.05) < 0.005
        assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 0.03
    assert uniform(torch.tensor([0, 1, 131071]), 7).tolist() == uniform(torch.tensor([0, 1, 131071]), 7).tolist()
    assert not torch.equal(uniform(at, 0), uniform(at, 1))


def test_local_mass_is_aligned_with_global_mass():
    score = Score(combine="aligned", local=2)
    whole, local = naive(), naive(queries=[5, 6])
    want = torch.maximum(local, whole * local.mean(-1, keepdim=True) / whole.mean(-1, keepdim=True))
    assert (got(score) - want).abs().max() < TOLERANCE
    assert (got(score) - torch.maximum(local, whole)).abs().max() > 100 * TOLERANCE
    assert (want > local + 100 * TOLERANCE).any() and (want == local).any()


def test_pooling_averages_neighbours_that_are_there():
    mass = naive(queries=[4, 5, 6])
    want = torch.stack([mass[:, max(0, s - 2) : s + 3].mean(-1) for s in range(S)], -1)
    assert (got(Score(queries=3, pool=5)) - want).abs().max() < TOLERANCE


def test_norms_recency_and_stride():
    assert torch.equal(got(Score("key_norm")).argsort(), K.norm(dim=-1).argsort(descending=True))
    assert torch.equal(got(Score("value_norm")).argsort(), V.norm(dim=-1).argsort())
    assert torch.equal(got(Score("recency")), K_AT.float())
    best = got(Score("stride", stride=4)).argsort(descending=True)[0]
    assert best[:7].tolist() == [19, 15, 11, 7, 3, 18, 17]


def test_random_differs_between_heads_and_seeds():
    a, b = got(Score("random")), got(Score("random", seed=1))
    assert a.unique().numel() == 2 * S and not torch.equal(a, b) and torch.equal(a, got(Score("random")))


def test_centers_are_ranked():
    for want, index in zip(centers_order(K, 6).sort(-1).values, choose(got(Score("centers"), count=6), 6), strict=True):
        assert torch.equal(want, index)


BAD = [
    ({"by": "key_nrom"}, "unknown by 'key_nrom' .did you mean 'key_norm'"),
    ({"normalize": "sum"}, "unknown normalize 'sum'.*known: none, count, length"),
    ({"queries": -1}, "queries is a number of tokens"),
    ({"queries": 1.5}, "queries is a number of tokens"),
    ({"queries": 0}, "no query is asked"),
    ({"probes": 1.2}, "probes is a share"),
    ({"pool": 4}, "pool is an odd number"),
    ({"local": 0}, "must be positive"),
    ({"by": "recency", "queries": 3}, "describe attention, and the score is by recency"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=str)
def test_bad_options_are_named(options, message):
    with pytest.raises(SmeltError, match=message):
        Score(**options)


def test_options_are_json():
    score = Score(queries=32, probes=0.05, normalize="count", pool=5, reduce="max", seed=3)
    assert Score(**json.loads(json.dumps(asdict(score)))) == score
    assert replace(score, queries=None) != score


def test_what_a_score_needs_is_asked_for():
    with pytest.raises(SmeltError, match="needs the queries"):
        scores(Score(), K, V, K_AT)
    with pytest.raises(SmeltError, match="how many tokens are kept"):
        scores(Score("centers"), K, V, K_AT)
