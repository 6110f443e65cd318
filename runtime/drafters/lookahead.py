"""Lookahead Decoding (Fu et al., 2024): n-grams from a Jacobi window that runs beside what is verified."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from ...ir.decode import Lookahead
from .base import Aside, Drafted, Growing, History, Verified, chosen_behind

FIRST, NEXT = 0.5, 0.8  # a guess's probability, and what each further token keeps of it


class LookaheadDrafter(History):
    """A window of `ngram` - 1 levels and `window` columns, and for each token the n-grams last seen behind it.

    The guess of level l and column c stands c + l + 1 places behind the pending token and sees it, the first level up
    to column c, and the levels above it in its own column. What the model chooses behind the last level ends an n-gram.
    """

    def __init__(self, draft: Lookahead, vocabulary: int, rows: int) -> None:
        super().__init__(rows)
        self.draft, self.levels = draft, draft.ngram - 1
        self._window: list[list[list[int]]] = [[] for _ in range(rows)]
        self._pool: list[dict[int, OrderedDict[tuple[int, ...], None]]] = [{} for _ in range(rows)]
        self._first: list[int] = [0] * rows  # the row of a step at which the window began
        w, n = draft.window, self.levels * draft.window
        self._depths = [c + level + 1 for level in range(self.levels) for c in range(w)]
        self._seen = torch.zeros(n, 1 + n, dtype=torch.bool)
        self._seen[:, 0] = True
        for level in range(self.levels):
            for c in range(w):
                at = level * w + c
                self._seen[at, 1 : 2 + c] = True
                self._seen[at, [1 + above * w + c for above in range(1, level + 1)]] = True

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        super().begin(row, tokens)
        known = self.tokens[row]
        for start in range(len(known) - self.draft.ngram + 1):
            self._remember(row, known[start : start + self.draft.ngram])
        spread = [known[i % len(known)] for i in range(self.levels * self.draft.window)]
        self._window[row] = [spread[level :: self.levels] for level in range(self.levels)]

    def observe(self, row: int, verified: Verified) -> None:
        super().observe(row, verified)
        if not verified.fresh:
            return
        window, width = self._window[row], self.draft.window
        last = self._first[row] + (self.levels - 1) * width
        newest = chosen_behind(verified, range(last, last + width))
        for column, token in enumerate(newest):
            self._remember(row, [*(level[column] for level in window), token])
        moved = [*window[1:], newest]
        passed = min(len(verified.fresh) - 1, width)  # places that are decided already
        known = self.tokens[row]
        self._window[row] = [level[passed:] + [known[-1 - i % len(known)] for i in range(passed)] for level in moved]

    def propose(self, row: int) -> Drafted:
        tree = Growing(self.tokens[row][-1])
        for ngram in reversed(self._pool[row].get(tree.tokens[0], ())):
            node, likely = 0, FIRST
            for token in ngram:
                node = tree.add(node, token, likely)
                likely *= NEXT
        out = tree.drafted()
        self._first[row] = len(out.tokens)
        out.aside = Aside([token for level in self._window[row] for token in level], self._depths, self._seen)
        return out

    def _remember(self, row: int, ngram: Sequence[int]) -> None:
        held = self._pool[row].setdefault(ngram[0], OrderedDict())
        held.pop(tuple(ngram[1:]), None)
        held[tuple(ngram[1:])] = None
        if len(held) > self.draft.guesses:
            held.popitem(last=False)
