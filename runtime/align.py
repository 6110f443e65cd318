"""Grammar-aligned decoding: answers that were drawn before lead the next ones to the model's own law in a grammar.

Masking draws each token by how likely it is, whatever the grammar does behind it: an answer that begins likely and can
only go on unlikely comes too often. Grammar-Aligned Decoding (Park et al., 2024; ASAp) weighs a token with how much of
the law behind it is grammatical, as far as answers to the same prompt have shown, and with 1 where none has been: too
much, never too little. The law of the answers so tends to the model's own, given the grammar.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from .guide import Guide

LEAST = 1e-30  # of hope, so that the tokens of a dead end can still be told from forbidden ones


class Node:
    """A prefix of answers. `share`: of the model's law behind it, what the grammar allows, 1 where nobody looked.

    `children`: the tokens that were drawn, each with its probability. All others count as one: they have the rest of
    the share. `hope`: what part of the law behind the prefix is grammatical to the end, at most.
    """

    __slots__ = ("children", "hope", "share")

    def __init__(self) -> None:
        self.share = self.hope = 1.0
        self.children: dict[int, tuple[float, Node]] = {}

    def reckon(self) -> None:
        """Hope from the children's."""
        lost = math.fsum(law * (1 - child.hope) for law, child in self.children.values())
        self.hope = min(max(self.share - lost, LEAST), 1.0)


@dataclass(frozen=True)
class Seen:
    """One token of an answer: the share that the grammar left where it was drawn, the token, and its probability."""

    share: float
    token: int
    law: float


class Alignment:
    """What is known of prompts and their grammars. May be shared by threads, and held over as many calls as one likes.

    A context counts by its tokens. `most` prefixes are kept: then the prompts that nobody asked for longest are
    forgotten, and a prompt that has reached the bound alone learns no new prefixes. To forget is safe: hope falls back
    to 1, which is masking.
    """

    def __init__(self, most: int = 1 << 18) -> None:
        self.most, self.lock = most, Lock()
        self._roots: OrderedDict[Hashable, Node] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """Prefixes that are kept."""
        return sum(self._sizes.values())

    def root(self, key: Hashable) -> Node:
        """What is known of a prompt with its grammar."""
        with self.lock:
            return self._root(key)

    def learn(self, key: Hashable, answer: Sequence[Seen]) -> None:
        """An answer, or as much of it as was drawn."""
        with self.lock:
            path = [self._root(key)]
            for seen in answer:
                path[-1].share = seen.share
                known = path[-1].children.get(seen.token)
                if known is None and not self._room(key):
                    break
                child = Node() if known is None else known[1]
                self._sizes[key] += known is None
                path[-1].children[seen.token] = seen.law, child
                path.append(child)
            for node in reversed(path):
                node.reckon()

    def _root(self, key: Hashable) -> Node:
        if key not in self._roots:
            self._roots[key], self._sizes[key] = Node(), 1
        self._roots.move_to_end(key)
        return self._roots[key]

    def _room(self, key: Hashable) -> bool:
        """Whether one more prefix fits, once older prompts than `key` are forgotten."""
        while len(self) >= self.most and next(iter(self._roots)) != key:
            oldest, _ = self._roots.popitem(last=False)
            del self._sizes[oldest]
        return len(self) < self.most


class Aligned(Guide):
    """Holds a row to its grammar by what an alignment knows of its prompt.

    The row's own tokens are learned when it is closed, so that rows of one call are drawn alike whatever their order.
    The model's law is that of its logits, before temperature and whatever else shapes them.
    """

    def __init__(self, matcher: Any, vocabulary: int, alignment: Alignment, key: Hashable) -> None:
        super().__init__(matcher, vocabulary)
        self._alignment, self._key = alignment, key
        self._at: Node | None = alignment.root(key)
        self._law, self._share = torch.empty(0), 1.0
        self._answer: list[Seen] = []

    def shape(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Guide`: hope is added in logs."""
        allowed = self.allowed
        self._law = logits.detach().cpu().double().softmax(-1)
        self._share = float(self._law[allowed].sum())
        shaped = logits.float().masked_fill(~allowed.to(logits.device), -torch.inf)
        known = dict(self._known())
        if known:
            ids = torch.tensor(list(known), device=logits.device)
            shaped[ids] += torch.tensor(list(known.values()), device=logits.device)
        return shaped

    def take(self, token: int) -> None:
        """See `Guide`."""
        super().take(token)
        self._answer.append(Seen(self._share, token, float(self._law[token])))
        if self._at is not None:
            known = self._at.children.get(token)
            self._at = None if known is None else known[1]

    def close(self) -> None:
        """See `Guide`."""
        answer, self._answer = self._answer, []
        if answer:
            self._alignment.learn(self._key, answer)

    def _known(self) -> Iterator[tuple[int, float]]:
        """Tokens behind the prefix that were drawn before, with the log of their hope."""
        if self._at is not None:
            with self._alignment.lock:
                yield from ((token, math.log(child.hope)) for token, (_, child) in self._at.children.items())
