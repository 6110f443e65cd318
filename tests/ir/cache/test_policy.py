"""Head policies: recovered mass against sums of probabilities, and heads made to look at one kind of token."""

import json
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from smelt.ir.cache.policy import NAMES, Policy, profile, recovered
from smelt.ir.cache.score import probabilities, sees
from smelt.ir.errors import SmeltError

TOLERANCE = 2e-6
S, D = 40, 16
AT = torch.arange(S)
SPECIAL, PUNCTUATION = AT < 1, AT % 10 == 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"window": 13}, {"softcap": 2.0}, {"sinks": torch.tensor([1.0, 0, 2, -1])}])
def test_recovered_mass_is_the_probability_that_is_held(options):
    q, k = random(4, 9, D), random(2, S, D, seed=1)
    q_at = torch.arange(31, 40)
    columns = torch.rand(3, 2, S, generator=torch.Generator().manual_seed(2)) < 0.3
    got = recovered(q, k, q_at, AT, columns, (0, 4, 12), 0.4, **options)
    seen = sees(q_at, AT[None], options.get("window"))
    p = probabilities(q, k, seen, 0.4, options.get("softcap"), options.get("sinks"))  # [G, R, n, S]
    for i, near in enumerate((0, 4, 12)):
        held = columns[i][:, None, None] | (q_at[:, None] - AT < near)
        lost = (p * ~held).sum(-1)
        assert (got[i] - (1 - lost.mean(-1)).amin(-1)).abs().max() < TOLERANCE
        assert (got[i] - (1 - lost.mean(-1)).amax(-1)).abs().max() > 100 * TOLERANCE


def built() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of heads that look at token 0, punctuation, a few heavy tokens, neighbours, and everything."""
    q, k = torch.zeros(5, S, D), torch.zeros(5, S, D)
    q[:4, :, 0] = 12.0
    k[0, SPECIAL, 0] = 1.0
    k[1, SPECIAL | PUNCTUATION, 0] = 1.0
    k[2, [2, 3, 8, 17], 0] = 1.0
    angle = AT * 0.1
    q[3], k[3] = 0.0, 0.0
    q[3, :, :2] = 300 * torch.stack([angle.cos(), angle.sin()], -1)
    k[3, :, :2] = torch.stack([angle.cos(), angle.sin()], -1)
    return q, k


def profiled(policy: Policy, q, k, **options):
    return profile(policy, q, k, AT, AT, SPECIAL, PUNCTUATION, 1.0, **options)


def test_each_head_gets_the_cheapest_policy_that_holds_its_mass():
    q, k = built()
    made = profiled(Policy(0.9, frequent=0.15, local=0.1, queries=20), q, k)
    assert [head.name for head in made] == list(NAMES)
    assert made[0].kept.tolist() == [0]
    assert made[1].kept.tolist() == [0, 5, 15, 25, 35]
    assert set(made[2].kept.tolist()) >= {0, 5, 15, 25, 35, 2, 3, 8, 17} and len(made[2].kept) <= 5 + 6
    assert set(made[3].kept.tolist()) >= {0, 5, 15, 25, 35, 36, 37, 38, 39} and len(made[3].kept) < 20
    assert made[4].kept.tolist() == list(range(S)) and made[4].recovered == 1.0
    assert all(0.9 <= head.recovered <= 1.0 for head in made)


def test_more_to_recover_never_keeps_fewer():
    q, k = random(4, S, D), random(2, S, D, seed=1)
    sizes = []
    for share in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):
        made = profiled(Policy(share, 0.3, 0.3), q, k)
        sizes.append([len(head.kept) for head in made])
        assert all(head.recovered >= share for head in made)
    assert sizes[0] == [1, 1] and sizes[-1] == [S, S]
    assert all(a <= b for low, high in pairwise(sizes) for a, b in zip(low, high, strict=True))


def test_the_worst_query_head_decides():
    q, k = built()
    pair = torch.stack([q[0], torch.zeros_like(q[0])])  # one looks at token 0, the other at everything
    assert profiled(Policy(0.9), pair[:1], k[:1])[0].name == "special"
    assert profiled(Policy(0.9, 0.1, 0.1), pair, k[:1])[0].name == "full"


def test_the_tail_is_read_under_every_policy():
    q, k = built()
    made = profiled(Policy(0.9, 0.15, 0.1, queries=20), q[3:4], k[3:4], always=4)
    assert made[0].name == "special" and made[0].kept.tolist() == [0, 36, 37, 38, 39]


def test_bad_options_and_classes_are_named():
    with pytest.raises(SmeltError, match="recover is a share"):
        Policy(recover=95)
    with pytest.raises(SmeltError, match="0 asks none"):
        Policy(queries=0)
    with pytest.raises(SmeltError, match="a class of each of 40 tokens"):
        profile(Policy(), *built(), AT, AT, SPECIAL[:3], PUNCTUATION, 1.0)
    assert Policy(**json.loads(json.dumps(asdict(Policy(0.9, queries=7))))) == Policy(0.9, queries=7)
