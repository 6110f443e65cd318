"""Sparse trees: never more rows than allowed, never fewer tokens for more of them, and their number is the chain's."""

from __future__ import annotations

import itertools

import pytest

from smelt.ir.decode import Sparse, sparse

RATES = {
    "usual": ((0.5, 0.1, 0.05), (0.3, 0.1), (0.2, 0.08, 0.04)),
    "poor": ((0.15, 0.08), (0.1, 0.08), (0.09,)),
    "sure": ((1.0,), (1.0,), (1.0,)),
    "hopeless": ((0.0,), (0.0,)),
}


def in_the_long_run(shape: Sparse, rates: tuple[tuple[float, ...], ...]) -> float:
    """Tokens a step, by following the chain of steps."""
    tree, reached = shape.tree, [1.0]
    for node in range(1, len(tree)):
        rate = rates[tree.depths[node] - 1][tree.ranks[node]]
        reached.append(reached[tree.parents[node]] * rate)
    known = [0.0] * len(rates) + [1.0]
    tokens = 0.0
    for step in range(400):
        after = [0.0] * (len(rates) + 1)
        gained = 0.0
        for k, share in enumerate(known):
            nodes = [node for node in range(len(tree)) if tree.depths[node] <= k]
            gained += share * sum(reached[node] for node in nodes)
            for node in nodes:
                down = sum(reached[child] for child in nodes if child and tree.parents[child] == node)
                after[shape.prompts[node]] += share * (reached[node] - down)
        known = after
        tokens += gained if step >= 200 else 0.0
    return tokens / 200


@pytest.mark.parametrize("name", RATES)
def test_its_tokens_are_those_of_the_chain(name: str) -> None:
    rates, before = RATES[name], 1.0
    for rows in (1, 2, 5, 9, 16, 31):
        shape = sparse(rates, rows)
        assert len(shape.tree) - 1 + sum(shape.prompts) <= rows
        assert max(shape.tree.depths) <= len(rates) and max(shape.prompts) <= len(rates) and shape.prompts[0] > 0
        assert list(shape.tree.depths) == sorted(shape.tree.depths)
        assert shape.tokens == pytest.approx(in_the_long_run(shape, rates), abs=0.01)
        assert shape.tokens >= before - 1e-9
        before = shape.tokens


def test_no_small_tree_is_better() -> None:
    rates = ((0.5, 0.2), (0.3,))
    shapes = [  # every tree of these rates, and every number of prompt tokens behind its nodes
        (paths, prompts)
        for paths in ([], [(0,)], [(0,), (1,)], [(0,), (0, 0)], [(0,), (1,), (0, 0)], [(0,), (1,), (0, 0), (1, 0)])
        for prompts in itertools.product(range(3), repeat=len(paths) + 1)
    ]
    for rows in (2, 4, 6):
        values = [
            in_the_long_run(Sparse(type(sparse(rates, 2).tree).from_paths(list(paths)), prompts, 0.0), rates)
            for paths, prompts in shapes
            if prompts[0] and len(paths) + sum(prompts) <= rows
        ]
        assert sparse(rates, rows).tokens > 0.97 * max(values)
