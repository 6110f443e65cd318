"""Which nodes of a draft tree are worth a row, and how many prompt tokens behind each: sparse trees (PPD, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from .tree import Tree

SURE = 0.999  # no guess is: every step may end at the pending token
GAIN = 1e-9  # tokens a step for each row; what gains less gains nothing


@dataclass(frozen=True)
class Sparse:
    """A draft tree, and for each node how many prompt tokens stand behind it; shorter paths come first.

    A step that knows guesses for k places takes the nodes of depth k or less. If it ends at a node, the next one knows
    guesses for as many places as the node has prompt tokens.
    tokens: of a step in the long run, the verified one included, if ranks hit independently at the rates given.
    """

    tree: Tree
    prompts: tuple[int, ...]
    tokens: float


@lru_cache(maxsize=32)
def sparse(rates: tuple[tuple[float, ...], ...], rows: int) -> Sparse:
    """The tree of at most `rows` drafted and prompt tokens; `rates[j][r]`: the hit rate of rank r at depth j + 1.

    It grows from the pending token and one prompt token or more, by whatever adds most tokens a step for each row,
    until all rows are taken or nothing adds; of these trees the best.
    """
    grown = [_grown(rates, rows, first) for first in range(1, min(len(rates), rows) + 1)]
    return max(grown, key=lambda each: round(each.tokens, 9))


@dataclass
class _Growth:
    """A tree under way; a step with k guesses leaves n for the next one in `moves[k][n]` of all cases."""

    moves: list[list[float]]
    tokens: list[float]  # of a step with k guesses
    paths: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    prompts: list[int] = field(default_factory=list)
    reached: list[float] = field(default_factory=lambda: [1.0])
    left: list[float] = field(default_factory=lambda: [1.0])  # of what reaches a node, what goes to no child

    def long_run(self) -> float:
        """Tokens a step, by how often each number of guesses is known: the chain's law, by elimination."""
        first = self.prompts[0]  # where every number leads to
        order = [first, *(n for n in range(len(self.moves)) if n != first)]
        a = [[self.moves[i][j] for j in order] for i in order]
        for k in range(len(a) - 1, 0, -1):
            out = sum(a[k][:k])
            for i in range(k):
                a[i][k] /= out
                for j in range(k):
                    a[i][j] += a[i][k] * a[k][j]
        law = [1.0]
        for k in range(1, len(a)):
            law.append(sum(law[i] * a[i][k] for i in range(k)))
        return sum(share * self.tokens[n] for share, n in zip(law, order, strict=True)) / sum(law)


@dataclass(frozen=True)
class _Change:
    """What goes from leaving `old` guesses to leaving `new`: shares[i] of the cases with depth + i guesses."""

    node: int
    old: int
    new: int
    depth: int
    shares: tuple[float, ...]
    path: tuple[int, ...] | None = None  # of a new node, behind `node`; else `node` has more prompt tokens

    @property
    def rows(self) -> int:
        return self.new + 1 if self.path else self.new - self.old

    def do(self, tree: _Growth, sign: int = 1) -> None:
        """Change what a step of the tree leaves and gains."""
        for k, share in enumerate(self.shares, self.depth):
            tree.moves[k][self.old] -= sign * share
            tree.moves[k][self.new] += sign * share
            tree.tokens[k] += sign * share if self.path else 0.0

    def keep(self, tree: _Growth) -> None:
        """Do it for good."""
        self.do(tree)
        if self.path is None:
            tree.prompts[self.node] = self.new
            return
        tree.left[self.node] -= self.shares[0]
        tree.paths.append(self.path)
        tree.prompts.append(self.new)
        tree.reached.append(self.shares[0])
        tree.left.append(self.shares[0])


def _grown(rates: tuple[tuple[float, ...], ...], rows: int, first: int) -> Sparse:
    most = len(rates)
    leaves = [[float(n == first) for n in range(most + 1)] for _ in range(most + 1)]
    tree, taken = _Growth(leaves, [1.0] * (most + 1), prompts=[first]), first
    value = tree.long_run()
    while True:
        best, gain = None, GAIN
        for change in _changes(tree, rates):
            if taken + change.rows > rows:
                continue
            change.do(tree)
            found = (_after(tree, change) - value) / change.rows
            change.do(tree, -1)
            if found > gain:
                best, gain = change, found
        if best is None:
            break
        best.keep(tree)
        taken, value = taken + best.rows, tree.long_run()
    known = dict(zip(tree.paths, tree.prompts, strict=True))
    paths = sorted(tree.paths, key=lambda path: (len(path), path))
    return Sparse(Tree.from_paths(paths[1:]), tuple(known[path] for path in paths), value)


def _after(tree: _Growth, change: _Change) -> float:
    """The long run once a change is done; the pending token's own number of guesses may be what it changes."""
    if change.path is not None or change.node:
        return tree.long_run()
    old, tree.prompts[0] = tree.prompts[0], change.new
    found = tree.long_run()
    tree.prompts[0] = old
    return found


def _changes(tree: _Growth, rates: tuple[tuple[float, ...], ...]) -> Iterator[_Change]:
    """For each node its next best child, with or without prompt tokens, and more prompt tokens behind it."""
    most = len(rates)
    for node, path in enumerate(tree.paths):
        depth, held = len(path), tree.prompts[node]
        rank = sum(other[:-1] == path for other in tree.paths if other)
        if depth < most and rank < len(rates[depth]) and rates[depth][rank] > 0:
            share = tree.reached[node] * rates[depth][rank] * SURE
            for prompts in range(most + 1):
                shares = (share,) * (most - depth)
                yield _Change(node, held, prompts, depth + 1, shares, (*path, rank))
        shares = (tree.reached[node], *[tree.left[node]] * (most - depth))
        for prompts in range(held + 1, most + 1):
            yield _Change(node, held, prompts, depth, shares)
