"""Drafters: the tree is filled from what was learned, the later of two lessons counts, rows do not mix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.runtime.drafters import Heads, Recycle, drafter

VOCABULARY = 12
TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 2), (1, 0, 1)])
PLAN = DecodePlan("recycle", TREE, 3)


def logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), st.integers(0, 9))
def test_of_one_token_twice_the_later_place_wins(tokens: list[int], seed: int) -> None:
    recycle, behind = Recycle(PLAN, VOCABULARY, 1), logits(len(tokens), seed)
    recycle.harvest(0, torch.tensor(tokens), behind)
    wanted = torch.zeros(VOCABULARY, 3, dtype=torch.int64)
    for token, row in zip(tokens, behind, strict=True):
        wanted[token] = row.sort(descending=True).indices[:3]
    assert torch.equal(recycle.matrix, wanted)


def test_a_later_harvest_replaces_what_it_sees_again_and_nothing_else() -> None:
    recycle = Recycle(PLAN, VOCABULARY, 1)
    recycle.harvest(0, torch.tensor([4, 7]), logits(2))
    kept = recycle.matrix[7].clone()
    recycle.harvest(0, torch.tensor([4]), logits(1, seed=1))
    assert recycle.matrix[4].tolist() == logits(1, seed=1).topk(3).indices[0].tolist()
    assert torch.equal(recycle.matrix[7], kept)


@given(st.integers(0, VOCABULARY - 1))
def test_recycle_follows_the_ranks_down_the_tree(root: int) -> None:
    recycle = Recycle(PLAN, VOCABULARY, 1)
    recycle.matrix = torch.randint(0, VOCABULARY, (VOCABULARY, 3), generator=torch.Generator().manual_seed(2))
    wanted = [root]
    for parent, rank in list(zip(TREE.parents, TREE.ranks, strict=True))[1:]:
        wanted.append(int(recycle.matrix[wanted[parent], rank]))
    assert recycle.propose(0, root).tolist() == wanted


def test_rows_share_what_recycling_learned() -> None:
    recycle = Recycle(PLAN, VOCABULARY, 2)
    recycle.harvest(0, torch.arange(VOCABULARY), logits(VOCABULARY))
    assert torch.equal(recycle.propose(0, 5), recycle.propose(1, 5))


def test_heads_take_their_rank_at_their_depth_in_their_row() -> None:
    heads = Heads(DecodePlan("heads", TREE, 3), VOCABULARY, 2)
    outputs = {"heads": torch.randn(2, 4, 3, VOCABULARY, generator=torch.Generator().manual_seed(3))}
    heads.observe(0, 2, outputs)
    heads.observe(1, 0, outputs)
    for row, node in ((0, 2), (1, 0)):
        best = outputs["heads"][row, node].topk(3).indices
        wanted = [int(best[depth - 1, rank]) for depth, rank in zip(TREE.depths, TREE.ranks, strict=True)]
        assert heads.propose(row, 9).tolist() == [9, *wanted[1:]]


def test_heads_have_nothing_to_propose_before_a_step() -> None:
    with pytest.raises(RuntimeError, match="row 1: heads propose only after a step was observed"):
        Heads(DecodePlan("heads", TREE, 3), VOCABULARY, 2).propose(1, 0)


def test_the_plan_names_the_drafter() -> None:
    assert isinstance(drafter(PLAN, VOCABULARY, 1), Recycle)
    assert isinstance(drafter(DecodePlan("heads", TREE, 3), VOCABULARY, 1), Heads)
    with pytest.raises(SmeltError, match=r"unknown drafter 'head' \(did you mean 'heads'\?\); known: recycle, heads"):
        drafter(DecodePlan("head", TREE, 3), VOCABULARY, 1)  # type: ignore[arg-type]
