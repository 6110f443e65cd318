"""Drafters: the tree is filled from what was learned, the later of two lessons counts, rows do not mix."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.codegen.largest import Largest
from smelt.ir import decode
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.runtime.drafters.base import Drafter, Verified
from smelt.runtime.drafters.heads import HeadsDrafter
from smelt.runtime.drafters.make import Setting, drafter
from smelt.runtime.drafters.table import RecycleDrafter
from smelt.runtime.drafters.trigrams import TrigramDrafter
from smelt.runtime.sampling import Sampling

VOCABULARY = 12
TREE = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 2), (1, 0, 1)])
RECYCLE, HEADS = decode.Recycle(TREE, 3), decode.Heads(TREE, 3)


def logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def recycling(rows: int = 1) -> RecycleDrafter:
    return RecycleDrafter(RECYCLE, VOCABULARY, rows)


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20), st.integers(0, 9))
def test_of_one_token_twice_the_later_place_wins(tokens: list[int], seed: int) -> None:
    recycle, behind = recycling(), logits(len(tokens), seed)
    recycle.harvest(0, torch.tensor(tokens), behind)
    wanted = torch.zeros(VOCABULARY, 3, dtype=torch.int64)
    for token, row in zip(tokens, behind, strict=True):
        wanted[token] = row.sort(descending=True).indices[:3]
    assert torch.equal(torch.from_numpy(recycle.matrix), wanted)


def test_a_later_harvest_replaces_what_it_sees_again_and_nothing_else() -> None:
    recycle = recycling()
    recycle.harvest(0, torch.tensor([4, 7]), logits(2))
    kept = recycle.matrix[7].copy()
    recycle.harvest(0, torch.tensor([4]), logits(1, seed=1))
    assert recycle.matrix[4].tolist() == logits(1, seed=1).topk(3).indices[0].tolist()
    assert (recycle.matrix[7] == kept).all()


@given(st.integers(0, VOCABULARY - 1))
def test_recycle_follows_the_ranks_down_the_tree(root: int) -> None:
    recycle = recycling()
    recycle.matrix = np.random.default_rng(2).integers(0, VOCABULARY, (VOCABULARY, 3))
    wanted = [root]
    for parent, rank in list(zip(TREE.parents, TREE.ranks, strict=True))[1:]:
        wanted.append(int(recycle.matrix[wanted[parent], rank]))
    recycle.begin(0, [1, root])
    assert recycle.propose(0).tokens == wanted and tuple(recycle.propose(0).parents) == TREE.parents


def test_rows_share_what_recycling_learned() -> None:
    recycle = recycling(2)
    recycle.harvest(0, torch.arange(VOCABULARY), logits(VOCABULARY))
    for row in (0, 1):
        recycle.begin(row, [5])
    assert recycle.propose(0).tokens == recycle.propose(1).tokens


def test_heads_take_their_rank_at_their_depth_in_their_row() -> None:
    heads = HeadsDrafter(HEADS, VOCABULARY, 2)
    outputs = torch.randn(2, 4, 3, VOCABULARY, generator=torch.Generator().manual_seed(3))
    for row, path in ((0, (0, 2)), (1, (0,))):
        heads.observe(row, Verified([9], path, {"heads": outputs[row]}))
        best = outputs[row, path[-1]].topk(3).indices
        wanted = [int(best[depth - 1, rank]) for depth, rank in zip(TREE.depths, TREE.ranks, strict=True)]
        assert heads.propose(row).tokens == [9, *wanted[1:]]


def test_heads_have_nothing_to_propose_before_a_step() -> None:
    with pytest.raises(RuntimeError, match="row 1: heads propose only after a step was observed"):
        HeadsDrafter(HEADS, VOCABULARY, 2).propose(1)


def paths(drafted: Any) -> list[tuple[int, ...]]:
    """Token paths from the root, in the order of the nodes."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(drafted.tokens)):
        found.append((*found[drafted.parents[node]], drafted.tokens[node]))
    return found[1:]


def setting(rows: int) -> Setting:
    """Rows of nothing: these drafters read no model."""
    session = SimpleNamespace(plan=SimpleNamespace(target="torch"))
    return Setting(session, Sampling(), torch.arange(rows))  # type: ignore[arg-type]


def begun(draft: decode.Draft, tokens: list[int], tables: dict[str, torch.Tensor] | None = None) -> Drafter:
    plan = DecodePlan(draft).with_tables(tables) if tables else DecodePlan(draft)
    made = drafter(plan, VOCABULARY, setting(1))
    made.begin(0, tokens)
    return made


def test_lookup_copies_behind_the_longest_agreement() -> None:
    text = [1, 2, 3, 7, 8, 9, 2, 3, 4, 5, 1, 2, 3]
    assert paths(begun(decode.Lookup(tokens=3), text).propose(0)) == [(7,), (7, 8), (7, 8, 9)]
    assert paths(begun(decode.Lookup(longest=2, tokens=2), text).propose(0)) == [(4,), (4, 5)]  # the newest
    both = begun(decode.Lookup(tokens=2, branches=2), text).propose(0)
    assert paths(both) == [(7,), (7, 8), (4,), (4, 5)]
    assert paths(begun(decode.Lookup(), [1, 2, 3, 4]).propose(0)) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_lookup_finds_what_a_search_finds(tokens: list[int], longest: int, cut: int) -> None:
    made = begun(decode.Lookup(longest, 1, 3), tokens[:cut])
    if tokens[cut:]:
        made.observe(0, Verified(tokens[cut:], (0,), {}))
    wanted: list[int] = []
    for n in range(min(longest, len(tokens)), 0, -1):
        starts = [at for at in range(n, len(tokens)) if tokens[at - n : at] == tokens[-n:]]
        if starts:
            wanted = tokens[starts[-1] : starts[-1] + 3]
            break
    assert made.propose(0).tokens == [tokens[-1], *wanted]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(2, 6), st.floats(0, 0.6))
def test_suffix_counts_what_a_search_counts(tokens: list[int], depth: int, least: float) -> None:
    drafted = begun(decode.Suffix(depth, 9.0, least, 64), tokens).propose(0)

    def counts(pattern: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for at in range(len(pattern), len(tokens)):
            if tokens[at - len(pattern) : at] == pattern:
                found[tokens[at]] = found.get(tokens[at], 0) + 1
        return found

    agree = next((n for n in range(min(len(tokens), depth - 1), 0, -1) if counts(tokens[-n:])), 0)
    wanted: dict[tuple[int, ...], float] = {}

    def grow(path: tuple[int, ...], likely: float) -> None:
        if agree + len(path) >= depth:
            return
        found = counts([*tokens[-agree:], *path])
        for token, times in found.items():
            share = likely * times / sum(found.values())
            if share >= least:
                wanted[*path, token] = share
                grow((*path, token), share)

    if agree:
        grow((), 1.0)
    assert set(paths(drafted)) == set(wanted) or len(wanted) > 9 * agree
    assert drafted.likely is not None
    for path, likely in zip(paths(drafted), drafted.likely[1:], strict=True):
        assert likely == pytest.approx(wanted[path])


def table(weights: dict[tuple[int, int], dict[int, float]]) -> dict[str, torch.Tensor]:
    pairs = sorted(weights, key=lambda pair: pair[0] * VOCABULARY + pair[1])
    rows = [sorted(weights[pair].items(), key=lambda each: -each[1])[:2] for pair in pairs]
    rows = [row + [(0, 0.0)] * (2 - len(row)) for row in rows]
    return {
        "trigrams.pairs": torch.tensor([a * VOCABULARY + b for a, b in pairs]),
        "trigrams.tokens": torch.tensor([[t for t, _ in row] for row in rows], dtype=torch.int32),
        "trigrams.weights": torch.tensor([[w for _, w in row] for row in rows]),
    }


COUNTED = table({(1, 2): {3: 0.6, 4: 0.4}, (2, 3): {5: 1.0}, (2, 4): {6: 0.5, 7: 0.5}, (3, 5): {8: 0.9, 9: 0.1}})


def test_trigrams_take_the_most_probable_paths() -> None:
    plain = decode.Trigrams(nodes=4, depth=3, gain=0.0, prompt=0.0)
    drafted = begun(plain, [1, 2], COUNTED).propose(0)
    assert paths(drafted) == [(3,), (3, 5), (3, 5, 8), (4,)]
    assert drafted.likely == pytest.approx([1.0, 0.6, 0.6, 0.54, 0.4])
    assert paths(begun(plain, [9], COUNTED).propose(0)) == paths(begun(plain, [1, 9], COUNTED).propose(0)) == []


def test_trigrams_gain_by_what_is_seen_up_to_a_cap_and_row_by_row() -> None:
    plan = DecodePlan(decode.Trigrams(gain=0.5, cap=0.7, prompt=0.0, window=3)).with_tables(COUNTED)
    made = drafter(plan, VOCABULARY, setting(2))
    made.begin(0, [1, 2, 4])
    made.begin(1, [1, 2])
    assert isinstance(made, TrigramDrafter)
    for _ in range(2):
        made.propose(0)
    assert made.successors(0, (1, 2)) == pytest.approx({3: 0.6, 4: 0.7})
    assert made.successors(1, (1, 2)) == pytest.approx({3: 0.6, 4: 0.4})
    made.observe(0, Verified([9, 9, 9], (0,), {}))
    made.propose(0)
    assert made.successors(0, (4, 9)) == {} and made.successors(0, (9, 9)) == {9: 0.5}


def test_the_published_search_visits_likely_paths_most() -> None:
    searched = decode.Trigrams(nodes=12, depth=4, gain=0.0, prompt=0.0, search="mcts", iterations=60)
    drafted = begun(searched, [1, 2], COUNTED).propose(0)
    found = paths(drafted)
    assert set(found) <= {(3,), (4,), (3, 5), (4, 6), (4, 7), (3, 5, 8), (3, 5, 9)} and (3, 5, 8) in found
    assert found.index((3,)) < found.index((4,))
    assert paths(begun(replace(searched, nodes=2), [1, 2], COUNTED).propose(0)) == [(3,), (3, 5)]


def test_a_union_takes_the_likeliest_nodes_of_all() -> None:
    first = decode.Trigrams(nodes=4, depth=3, gain=0.0, prompt=0.0)
    text = [2, 4, 6, 9, 1, 2, 4, 7, 3, 1, 2]
    union = decode.Union((first, decode.Lookup(longest=2, tokens=3)), nodes=5)
    drafted = begun(union, text, COUNTED).propose_all([0])[0]
    alone = {path for draft in union.drafts for path in paths(begun(draft, text, COUNTED).propose(0))}
    assert len(alone) == 6 and set(paths(drafted)) == alone - {(4, 7, 3)}  # (4,) at 0.6 by lookup, 0.4 by the table
    assert drafted.likely == pytest.approx([1.0, 0.6, 0.6, 0.6, 0.54, 0.54])


def test_a_kernel_finds_the_successors_that_the_reference_finds() -> None:
    random = torch.Generator().manual_seed(0)
    behind = torch.rand(3, 4099, generator=random)
    plain = RecycleDrafter(RECYCLE, 4099, 1)
    found = RecycleDrafter(RECYCLE, 4099, 1, Largest(RECYCLE.width))
    for made in (plain, found):
        made.harvest(0, torch.tensor([7, 4098, 7]), behind)  # the later place counts
    assert np.array_equal(plain.matrix, found.matrix) and found.matrix[7].tolist() == behind[2].topk(3).indices.tolist()


def test_the_plan_names_the_drafter() -> None:
    assert isinstance(drafter(DecodePlan(RECYCLE), VOCABULARY, setting(1)), RecycleDrafter)
    assert isinstance(drafter(DecodePlan(HEADS), VOCABULARY, setting(1)), HeadsDrafter)
    with pytest.raises(SmeltError, match=r"unknown kind 'head' \(did you mean 'heads'\?\); known: recycle, heads"):
        DecodePlan.from_dict({"draft": {"kind": "head"}, "accept": {"kind": "walk"}})


PLANS = [
    DecodePlan(RECYCLE),
    DecodePlan(decode.Union((RECYCLE, decode.Lookup(5), decode.Suffix(), decode.Trigrams())), decode.Typical()),
    DecodePlan(decode.Lookahead(), decode.Near(top=3)),
    DecodePlan(decode.Prompts(((0.5, 0.1), (0.3,)), 9)),
    DecodePlan(decode.Jacobi()).with_tables({"x": torch.arange(3)}),
]


@pytest.mark.parametrize("plan", PLANS)
def test_plans_survive_their_text(plan: DecodePlan) -> None:
    assert DecodePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.with_tables({"y": torch.zeros(1)}) != plan


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: decode.Lookup(2, 3), "longest is 2, less than shortest, 3"),
        (lambda: decode.Lookup(tokens=0), "tokens counts from 1, not 0"),
        (lambda: decode.Suffix(factor=0), "factor must be above 0"),
        (lambda: decode.Union((RECYCLE,)), "a union joins two drafters or more"),
        (lambda: decode.Union((RECYCLE, decode.Lookahead())), "which 'lookahead' is not"),
        (lambda: decode.Recycle(TREE, 2), "the draft tree uses rank 2, but the drafter keeps 2"),
        (
            lambda: DecodePlan(RECYCLE, decode.KSequential()),
            "acceptance by k_sequential is not valid for the drafts of recycle, which are fixed: it takes iid ones",
        ),
        (lambda: decode.Typical(epsilon=0), "epsilon is in"),
        (lambda: decode.Near(top=0), "top counts from 1"),
        (lambda: decode.Merge(1.0), "delta is in"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises(SmeltError, match=says):
        make()
