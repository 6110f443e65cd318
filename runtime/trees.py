"""The drafts of all rows as one step: tokens, depths and who sees whom, padded to few widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .drafters.base import Drafted, ancestors, depths

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of trees that differ from step to step


def padded(nodes: int) -> int:
    """The width of a step that holds so many nodes: kernels are bound for few of them."""
    return next((width for width in WIDTHS if width >= nodes), nodes)


def integers(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [B, N] of as many in each row.

    Between two steps everything is cold: through numpy this takes 26 us, by torch.tensor 42 (a Zen 5 core, 2026-11-22).
    """
    return torch.from_numpy(np.array(rows, np.int64))


@dataclass(frozen=True)
class Below:
    """What was drafted behind a node: tokens and nodes in the order of the draft, and the law they were drawn from."""

    tokens: list[int]
    nodes: list[int]
    law: torch.Tensor | None


class Trees:
    """One draft a row. `tokens` int64 and `real` bool are [B, N], `ancestors` bool [N, N] or [B, N, N].

    `whole`: nothing of it is padding. `deepest`: places of the deepest node behind the roots. Only `tokens` may be
    written to.
    """

    def __init__(self, drafts: Sequence[Drafted], fixed: bool = False) -> None:
        """`fixed`: all steps have drafts of one shape, so that its own width serves."""
        self.drafts = drafts
        shapes = [(tuple(draft.parents), draft.aside) for draft in drafts]
        same = all(shape == shapes[0] for shape in shapes) if shapes[0][1] is None else len(shapes) == 1
        rows = [draft.tokens + draft.aside.tokens if draft.aside else draft.tokens for draft in drafts]
        sizes = tuple(map(len, rows))
        width = max(sizes) if fixed else padded(max(sizes))
        self.tokens = integers([tokens + [0] * (width - len(tokens)) for tokens in rows])
        self.real, self.whole = _real(sizes, width), min(sizes) == width
        self.ancestors: torch.Tensor | None = None
        shaped = drafts[:1] if same else drafts
        levels: list[list[int]] = [_depths(draft, width).tolist() for draft in shaped]
        self._levels = levels * len(drafts) if same else levels
        self.deepest = max(map(max, levels))
        if width > 1:
            seen = [_seen(draft, width) for draft in shaped]
            self.ancestors = seen[0] if same else torch.stack(seen)
        self._children: list[dict[tuple[int, int], int] | None] = [None] * len(drafts)

    def behind(self, lengths: Sequence[int]) -> torch.Tensor:
        """Positions int64 [B, N] behind rows of these lengths."""
        placed = zip(lengths, self._levels, strict=True)
        return integers([[length + depth for depth in levels] for length, levels in placed])

    def child(self, row: int, node: int, token: int) -> int | None:
        """The node that holds a token behind a node, the first of several."""
        known = self._children[row]
        if known is None:
            draft, known = self.drafts[row], {}
            for child in range(1, len(draft.tokens)):
                known.setdefault((draft.parents[child], draft.tokens[child]), child)
            self._children[row] = known
        return known.get((node, token))

    def below(self, row: int, node: int) -> Below:
        """What was drafted behind a node."""
        draft = self.drafts[row]
        if draft.draws is not None:
            nodes = [child for parent, child in draft.draws if parent == node]
        else:
            nodes = [child for child in range(1, len(draft.tokens)) if draft.parents[child] == node]
        law = None if draft.laws is None else draft.laws[node]
        return Below([draft.tokens[child] for child in nodes], nodes, law)


@lru_cache(maxsize=512)
def _real(sizes: tuple[int, ...], width: int) -> torch.Tensor:
    """bool [B, width]: the rows of a step that hold something."""
    return torch.arange(width) < torch.tensor(sizes)[:, None]


def _seen(draft: Drafted, width: int) -> torch.Tensor:
    tree = len(draft.tokens)
    seen = ancestors(tuple(draft.parents), width)
    if draft.aside is None:
        return seen
    seen, aside = seen.clone(), draft.aside
    rows = slice(tree, tree + len(aside.tokens))
    behind = torch.tensor(aside.nodes or [0] * len(aside.tokens))
    seen[rows, :tree] = seen[behind, :tree] & aside.seen[:, :1]
    seen[rows, rows] = aside.seen[:, 1:]
    return seen


def _depths(draft: Drafted, width: int) -> torch.Tensor:
    found = depths(tuple(draft.parents), width)
    if draft.aside is None:
        return found
    tree = len(draft.tokens)
    found = found.clone()
    found[tree : tree + len(draft.aside.depths)] = torch.tensor(draft.aside.depths)
    return found
