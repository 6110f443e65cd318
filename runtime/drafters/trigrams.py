"""ADED (Liu et al., 2024): what follows two tokens, from a counted text and the request, searched for likely paths."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random

import numpy as np
import torch

from ...ir.decode import Trigrams
from .base import Drafted, Growing, History

Successors = dict[int, float]


class TrigramDrafter(History):
    """A table of weights that starts from the counted text and follows each row's own tokens, every row apart."""

    def __init__(
        self, draft: Trigrams, tables: Mapping[str, torch.Tensor], vocabulary: int, rows: int, seed: int = 0
    ) -> None:
        super().__init__(rows)
        self.draft = draft
        names = ("pairs", "tokens", "weights")
        self._counted = [tables[f"trigrams.{name}"].numpy() for name in names] if "trigrams.pairs" in tables else None
        self._vocabulary = vocabulary
        self._changed: list[dict[tuple[int, int], Successors]] = [{} for _ in range(rows)]
        self._random = Random(seed)

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        super().begin(row, tokens)
        if self.draft.prompt:
            self._gain(row, len(tokens), self.draft.prompt)

    def propose(self, row: int) -> Drafted:
        known = self.tokens[row]
        self._gain(row, self.draft.window, self.draft.gain)
        if len(known) < 2:
            return Drafted.chain(known[-1:])
        tree = _Mcts(self, row).tree() if self.draft.search == "mcts" else self._best(row)
        return tree.drafted()

    def successors(self, row: int, pair: tuple[int, int]) -> Successors:
        """Weights of what follows two tokens."""
        changed = self._changed[row].get(pair)
        return self._read(pair) if changed is None else changed

    def _read(self, pair: tuple[int, int]) -> Successors:
        if self._counted is None:
            return {}
        pairs, tokens, weights = self._counted
        key = pair[0] * self._vocabulary + pair[1]
        at = int(np.searchsorted(pairs, key))
        if at == len(pairs) or pairs[at] != key:
            return {}
        return {t: w for t, w in zip(tokens[at].tolist(), weights[at].tolist(), strict=True) if w > 0}

    def _gain(self, row: int, window: int, gain: float) -> None:
        """Each trigram among the last `window` tokens gains weight."""
        known, changed = self.tokens[row][-window:], self._changed[row]
        for a, b, c in zip(known, known[1:], known[2:], strict=False):
            found = changed.get((a, b))
            if found is None:
                found = changed[a, b] = self._read((a, b))
            found[c] = min(self.draft.cap, found.get(c, 0.0) + gain)

    def _best(self, row: int) -> Growing:
        """The most probable paths: weights of a pair, normalised, are the law of what follows it."""
        known = self.tokens[row]
        tree, order = Growing(known[-1]), count()
        heap: list[tuple[float, int, int, int, int, int]] = []

        def grow(parent: int, depth: int, likely: float, pair: tuple[int, int]) -> None:
            found = self.successors(row, pair)
            total = sum(found.values())
            for token, weight in found.items():
                heapq.heappush(heap, (-likely * weight / total, next(order), parent, depth, pair[1], token))

        grow(0, 1, 1.0, (known[-2], known[-1]))
        while heap and len(tree) <= self.draft.nodes:
            likely, _, parent, depth, before, token = heapq.heappop(heap)
            node = tree.add(parent, token, -likely)
            if depth < self.draft.depth:
                grow(node, depth + 1, -likely, (before, token))
        return tree


@dataclass
class _Visited:
    """A state of the published search."""

    prior: float
    visits: int = 0
    reward: float = 0.0
    children: dict[int, _Visited] = field(default_factory=dict)


class _Mcts:
    """The published search: PUCT over the weights, random rollouts, the most visited prefixes, one token longer."""

    def __init__(self, drafter: TrigramDrafter, row: int) -> None:
        self.drafter, self.row, self.draft, self._random = drafter, row, drafter.draft, drafter._random
        self._pair = drafter.tokens[row][-2], drafter.tokens[row][-1]
        self._root = _Visited(1.0)

    def tree(self) -> Growing:
        for _ in range(self.draft.iterations):
            self._visit()
        ranked: list[tuple[int, tuple[int, ...]]] = []
        self._collect(self._root, (), ranked)
        ranked.sort(key=lambda each: (-each[0], len(each[1]), each[1]))
        tree = Growing(self._pair[1])
        for visits, path in ranked[: self.draft.keep]:
            following = self.drafter.successors(self.row, ((*self._pair, *path)[-2], (*self._pair, *path)[-1]))
            longer = (*path, max(following, key=lambda t: following[t])) if following else path
            node = 0
            for token in longer:
                if len(tree) > self.draft.nodes and (node, token) not in tree:
                    break
                node = tree.add(node, token, visits / self.draft.iterations)
        return tree

    def _visit(self) -> None:
        path, state, reward, pair = [self._root], self._root, 1.0, self._pair
        while state.children:
            token, state = max(state.children.items(), key=lambda each: self._score(path[-1], each[1]))
            path.append(state)
            reward += state.prior
            pair = (pair[1], token)
        if len(path) <= self.draft.depth - 1:
            for token, weight in self.drafter.successors(self.row, pair).items():
                state.children[token] = _Visited(weight)
        for _ in range(self.draft.depth - len(path)):
            following = self.drafter.successors(self.row, pair)
            if not following:
                break
            (token,) = self._random.choices(list(following), list(following.values()))
            reward += following[token]
            pair = (pair[1], token)
        for each in path:
            each.visits += 1
            each.reward += reward

    def _score(self, parent: _Visited, child: _Visited) -> float:
        if not child.visits:
            return math.inf
        widen = self.draft.explore + math.log((parent.visits + self.draft.scale + 1) / self.draft.scale)
        explored = widen * child.prior * math.sqrt(parent.visits) / (1 + child.visits)
        return child.reward / child.visits + explored

    def _collect(self, state: _Visited, path: tuple[int, ...], out: list[tuple[int, tuple[int, ...]]]) -> None:
        for token, child in state.children.items():
            if child.visits:
                out.append((child.visits, (*path, token)))
                self._collect(child, (*path, token), out)
