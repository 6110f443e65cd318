"""Draft trees: best-first is the best tree of every size, and the tree of a known law has a known shape."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.decode import Tree
from smelt.passes.decode._trees import best_tree, expected_tokens, usual_rates

RATES = st.lists(st.lists(st.integers(0, 100).map(lambda n: n / 100), min_size=2, max_size=2), min_size=1, max_size=3)


def closed(paths: tuple[tuple[int, ...], ...]) -> bool:
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


@given(rates=RATES, nodes=st.integers(1, 5))
def test_no_tree_of_its_size_drafts_better(rates, nodes):
    tree = best_tree(rates, nodes)
    every = [path for depth in range(1, len(rates) + 1) for path in itertools.product(range(2), repeat=depth)]
    trees = (Tree.from_paths(list(c)) for n in range(nodes + 1) for c in itertools.combinations(every, n) if closed(c))
    best = max(expected_tokens(rates, other) for other in trees)
    assert len(tree) <= nodes + 1
    assert expected_tokens(rates, tree) == pytest.approx(best, abs=1e-9)


def test_a_worse_tree_is_told_apart():
    rates = [[0.5, 0.4], [0.3, 0.1]]
    assert best_tree(rates, 3) == Tree.from_paths([(0,), (1,), (0, 0)])
    assert expected_tokens(rates, Tree.from_paths([(0,), (0, 0), (0, 1)])) == pytest.approx(1 + 0.5 + 0.15 + 0.05)
    assert expected_tokens(rates, best_tree(rates, 3)) == pytest.approx(1 + 0.5 + 0.4 + 0.15)


def test_what_is_never_reached_is_left_out():
    assert best_tree([[0.5, 0.0], [0.0, 0.2]], 9) == Tree.from_paths([(0,), (0, 1)])


def test_the_usual_tree_is_close_to_the_published_one():
    tree = best_tree([usual_rates(8)] * 6, 80)
    assert [tree.depths.count(depth) for depth in range(7)] == [1, 8, 21, 25, 17, 8, 1]
    assert max(tree.ranks) == 7


def test_a_smaller_tree_is_a_part_of_a_larger_one():
    def paths(tree):
        out = [()]
        for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
            out.append((*out[parent], rank))
        return set(out)

    rates = [usual_rates(8)] * 6
    sizes = [paths(best_tree(rates, nodes)) for nodes in (1, 8, 31, 63, 80)]
    assert all(small < large for small, large in itertools.pairwise(sizes))


@pytest.mark.parametrize("width", [1, 2, 10])
def test_usual_rates_are_a_falling_law(width):
    rates = usual_rates(width)
    assert len(rates) == width and sum(rates) < 1
    assert all(a > b for a, b in itertools.pairwise(rates))
