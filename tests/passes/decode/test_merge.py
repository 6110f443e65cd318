"""decode.merge: neighbours as a loop finds them, the bound's rule, and what it cannot do."""

import torch

from smelt.ir import decode
from smelt.passes.decode.draft import Draft
from smelt.passes.decode.lookup import Lookup
from smelt.passes.decode.merge import Merge, nearest
from smelt.passes.decode.skip import Skip


def test_neighbours_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr("smelt.passes.decode.merge.ROWS", 7)
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    found = nearest(points, 6)
    for i, point in enumerate(points):
        order = (points - point).square().sum(-1).argsort().tolist()
        assert found[i].tolist() == [j for j in order if j != i][:6]


def test_the_rule_has_a_bound_and_its_table(cached):
    Lookup().apply(cached, None)
    outcome = Merge(delta=0.2, neighbours=5).apply(cached, None)
    assert (
        cached.decode.accept == decode.Merge(0.2) and cached.decode.accept.law == "bounded" and not cached.decode.exact
    )
    assert cached.decode.tables["neighbours"].shape == (97, 5) and outcome.notes == {"bytes": 97 * 5 * 4}


def test_it_takes_fixed_drafts_and_fewer_neighbours_than_tokens(cached):
    assert list(Merge().requires(cached)) == ["llama must draft: put a step such as decode.draft in front"]
    Lookup().apply(cached, None)
    assert list(Merge().requires(cached)) == []
    assert list(Merge(neighbours=97).requires(cached)) == ["neighbours must be fewer than the 97 tokens"]
    cached.decode = None
    Skip(layers=(1,)).apply(cached, None)
    Draft(draws="distinct").apply(cached, None)
    (said,) = Merge().requires(cached)
    assert "acceptance by merge is not valid for the drafts of model, which are distinct" in said
