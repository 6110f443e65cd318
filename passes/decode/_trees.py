"""Static draft trees: the nodes that are most likely to be accepted, from the hit rate of every rank at every depth."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ...ir.decode import Tree, usual_rates

__all__ = ["best_tree", "expected_tokens", "usual_rates"]


def best_tree(rates: Sequence[Sequence[float]], nodes: int) -> Tree:
    """The `nodes` drafted nodes (the root not counted) of the highest path products; `rates[d][r]` at depth d + 1.

    A path's product is the share of steps that reach its node if ranks hit independently of each other, so that the
    sum over all nodes is the expected number of accepted drafts, and the best-first order maximises it for every count.
    Nodes that are never reached are left out. Among equals the first in the order of their rank paths is taken.
    """
    heap: list[tuple[float, tuple[int, ...], float]] = [(-1.0, (), 1.0)]
    paths: list[tuple[int, ...]] = []
    while heap and len(paths) <= nodes:
        _, path, reached = heapq.heappop(heap)
        paths.append(path)
        for rank, rate in enumerate(rates[len(path)] if len(path) < len(rates) else ()):
            if rate > 0:
                # rounded in comparisons, so that equal products are equal in whatever order they were multiplied
                heapq.heappush(heap, (-round(reached * rate, 12), (*path, rank), reached * rate))
    return Tree.from_paths(paths[1:])


def expected_tokens(rates: Sequence[Sequence[float]], tree: Tree) -> float:
    """Tokens that a step commits, the verified one included, if ranks hit independently at these rates."""
    reached = [1.0]
    for parent, rank, depth in zip(tree.parents[1:], tree.ranks[1:], tree.depths[1:], strict=True):
        reached.append(reached[parent] * rates[depth - 1][rank])
    return sum(reached)
