"""A static draft tree: what a drafter fills with candidates, always in the same places."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SmeltError

FIRST, REST = 0.5, 0.2  # hit rates before anything is measured: 0.5 for the best candidate, 0.2 / (r + 1) for rank r


@dataclass(frozen=True)
class Tree:
    """A static draft tree in topological order; node 0 is the root, the newest token that is not yet in the cache.

    `parents[i] < i` is the parent of node i; `ranks[i]` says that the node takes its parent's `ranks[i]`-th best
    candidate. `parents[0]` and `ranks[0]` are 0 and mean nothing.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or len(self.parents) != len(self.ranks):
            raise SmeltError("a draft tree needs a root and one rank for each node")
        if any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise SmeltError("a draft tree must list parents before their children")

    @classmethod
    def from_paths(cls, paths: list[tuple[int, ...]]) -> Tree:
        """The tree of all prefixes of rank paths such as (0,), (0, 1); shorter paths come first."""
        known: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [0], [0]
        for path in sorted({p[:n] for p in paths for n in range(1, len(p) + 1)}, key=lambda p: (len(p), p)):
            known[path] = len(parents)
            parents.append(known[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks))

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Distance of every node from the root."""
        depth = [0]
        for parent in self.parents[1:]:
            depth.append(depth[parent] + 1)
        return tuple(depth)


def usual_rates(width: int) -> tuple[float, ...]:
    """The hit rate assumed for each of `width` ranks, best first: a Zipf law with a heavier head.

    With 8 ranks and 6 levels the best 80 nodes stand 8, 21, 25, 17, 8 and 1 to a level; the template that was published
    with Token Recycling has 8, 21, 25, 15, 8 and 3.
    """
    return (FIRST, *(REST / (rank + 1) for rank in range(1, width)))[:width]
