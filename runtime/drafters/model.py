"""A smaller decoder drafts: it draws from its own law behind every node of a tree, level by level."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from ...ir.decode import Model, Tree
from .. import noise
from ..sampling import Sampling
from ..session import Session
from ..trees import Trees
from .base import Drafted, Growing, History

DRAWS = 0x5EED_D4A3  # the stream of a draft's own noise


@dataclass
class _Node:
    """Where a tree can grow: the order in which tokens are drawn, and the law, float64 [V]."""

    law: torch.Tensor
    order: torch.Tensor
    value: float
    left: float = 1.0
    drawn: int = 0

    def draw(self) -> tuple[int, float] | None:
        """The next token, and the probability that it has among those that are left; None when no token is."""
        token = int(self.order[self.drawn]) if self.drawn < len(self.order) else -1
        if token < 0 or not self.law[token] > 0:
            return None
        share = min(1.0, float(self.law[token]) / max(self.left, 1e-12))
        self.drawn += 1
        self.left -= float(self.law[token])
        return token, share


@dataclass
class Sketch:
    """A row's tree while it grows."""

    tree: Growing
    laws: dict[int, torch.Tensor] = field(default_factory=dict)
    draws: list[tuple[int, int]] = field(default_factory=list)
    level: dict[int, int] = field(default_factory=dict)  # nodes of the newest level, and how many draws each stands for
    places: dict[int, int] = field(default_factory=lambda: {0: 0})  # nodes of a fixed shape that exist
    over: bool = False


class ModelDrafter(History):
    """Runs the draft model's plan over a cache of its own, which holds what the model's cache holds."""

    def __init__(self, draft: Model, session: Session, sampling: Sampling, requests: torch.Tensor) -> None:
        super().__init__(len(requests))
        self.draft, self.session, self.requests = draft, session, requests
        self.sampling = replace(sampling, repetition_penalty=1.0)  # drafts know no context: it costs hits, no token
        self._entropies: list[list[float]] = [[] for _ in requests]
        self._most = 1 + (max(draft.tree.ranks) if draft.tree is not None else draft.width)

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        logits = self._read(rows)
        drafts = {row: Sketch(Growing(self.tokens[row][-1]), level={0: self.draft.width}) for row in rows}
        behind = {row: {0: logits[row]} for row in rows}
        depth = max(self.draft.tree.depths) if self.draft.tree is not None else self.draft.depth
        for level in range(1, depth + 1):
            for row, draft in drafts.items():
                if not draft.over:
                    self._grow(row, draft, behind[row], level)
            growing = [row for row, draft in drafts.items() if draft.level and not draft.over]
            if level == depth or not growing:
                break
            behind = self._step(drafts, growing)
        return {row: self._drafted(draft, logits.shape[-1]) for row, draft in drafts.items()}

    def _read(self, rows: Sequence[int]) -> torch.Tensor:
        """Commit what the draft model has not read yet, the pending tokens last; logits [B, V] behind them."""
        cache = self.session.cache
        unread = max(len(self.tokens[row]) - cache.lengths[row] for row in rows)
        if cache.empty or unread > 1 + self.draft.most:  # prompts, and what came without a draft
            self.session.prefill(
                [tokens[cache.lengths[row] : -1] if row in rows else [] for row, tokens in enumerate(self.tokens)]
            )
        fresh = [tokens[cache.lengths[row] :] if row in rows else [] for row, tokens in enumerate(self.tokens)]
        chains = Trees([Drafted.chain(new or [0]) for new in fresh])
        running = torch.tensor([bool(new) for new in fresh])
        positions = chains.behind(cache.lengths)
        valid = running[:, None] & chains.real
        outputs = self.session.step(chains.tokens, positions * valid, valid)
        last = outputs["logits"][torch.arange(len(fresh)), torch.tensor([max(0, len(new) - 1) for new in fresh])]
        last = last.clone()
        cache.commit([list(range(len(new))) for new in fresh])
        return last

    def _step(self, drafts: dict[int, Sketch], rows: Sequence[int]) -> dict[int, dict[int, torch.Tensor]]:
        """Logits behind the nodes of the newest levels; the draft model reads whole trees and keeps nothing of them."""
        some = drafts[rows[0]].tree.drafted()
        trees = Trees([drafts[row].tree.drafted() if row in rows else some for row in range(len(self.tokens))])
        running = torch.tensor([row in rows for row in range(len(self.tokens))])
        positions = trees.behind([length - 1 for length in self.session.cache.lengths])
        valid = running[:, None] & trees.real & (positions < self.session.cache.capacity)
        outputs = self._evaluate(trees, positions * valid, valid)
        return {row: {node: outputs["logits"][row, node - 1] for node in drafts[row].level} for row in rows}

    def _evaluate(self, trees: Trees, positions: torch.Tensor, valid: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The draft model's outputs at all nodes but the roots, which it has read already."""
        assert trees.ancestors is not None
        tokens, positions, valid = (each[:, 1:].contiguous() for each in (trees.tokens, positions, valid))
        seen = trees.ancestors[..., 1:, 1:].contiguous()
        return self.session.step(tokens, positions, valid, seen, more=self._more(trees))

    def _more(self, trees: Trees) -> Mapping[str, torch.Tensor] | None:
        """What the draft model reads beside tokens and positions at all nodes but the roots."""
        return None

    def _grow(self, row: int, draft: Sketch, behind: dict[int, torch.Tensor], depth: int) -> None:
        """One more level of a row's tree."""
        at = len(self.tokens[row]) + depth - 1  # the position of what is drawn
        found = {node: self._node(row, at, logits, draft.tree.likely[node]) for node, logits in behind.items()}
        if self.draft.entropy is not None:
            self._entropies[row].append(_entropy(found[next(iter(found))].law))
            recent = self._entropies[row][-self.draft.window :]
            if sum(recent) / len(recent) > self.draft.entropy:
                draft.over = True
                return
        chosen: dict[int, int] = {}
        for parent, token, value in self._chosen(row, at, draft, found):
            node = draft.tree.add(parent, token, value)
            draft.draws.append((parent, node))
            chosen[node] = chosen.get(node, 0) + 1
        draft.laws |= {node: each.law for node, each in found.items()}
        draft.level = chosen

    def _node(self, row: int, position: int, logits: torch.Tensor, value: float) -> _Node:
        """The law behind a node, and the order in which its tokens come."""
        processed = self.sampling.process(logits[None], None)[0].double()
        if self.sampling.greedy:
            law, keys = processed.softmax(-1), processed
        else:
            law, keys = processed.softmax(-1), processed.log_softmax(-1) + self._noise(row, position, len(processed), 0)
        return _Node(law, keys.topk(min(self._most, len(keys))).indices, value)

    def _noise(self, row: int, position: int, size: int, stream: int) -> torch.Tensor:
        seed = self.sampling.seed
        seed = seed if self.draft.draws == "coupled" else seed ^ (DRAWS + stream)
        return noise.gumbel(seed, self.requests[row : row + 1], torch.tensor([position]), size)[0]

    def _chosen(
        self, row: int, position: int, draft: Sketch, found: dict[int, _Node]
    ) -> Iterator[tuple[int, int, float]]:
        """(parent, token, value) of each draw of a level."""
        if self.draft.draws == "iid":
            yield from self._independent(row, position, draft, found)
        elif self.draft.tree is not None:
            yield from _shaped(self.draft.tree, draft, found)
        else:
            yield from _likeliest(found, self.draft.width)

    def _independent(
        self, row: int, position: int, draft: Sketch, found: dict[int, _Node]
    ) -> Iterator[tuple[int, int, float]]:
        """Every chain draws for itself."""
        stream = 0
        for parent, node in found.items():
            for _ in range(draft.level[parent]):
                stream += 1
                keys = node.law.log()
                if not self.sampling.greedy:
                    keys = keys + self._noise(row, position, len(keys), stream)
                token = int(keys.argmax())
                yield parent, token, node.value * float(node.law[token])

    def _drafted(self, draft: Sketch, vocabulary: int) -> Drafted:
        out = draft.tree.drafted()
        if self.draft.draws == "coupled":
            return out
        laws = torch.zeros(len(out.tokens), vocabulary, dtype=torch.float64)
        for node, law in draft.laws.items():
            laws[node] = law
        out.laws, out.draws = laws, draft.draws
        return out


def _likeliest(found: dict[int, _Node], width: int) -> Iterator[tuple[int, int, float]]:
    """`width` draws where they are likeliest to be reached; which node draws next is known before the draw."""
    order = count()
    slots = [(-node.value, next(order), parent) for parent, node in found.items()]
    heapq.heapify(slots)
    for _ in range(width):
        if not slots:
            return
        value, _, parent = heapq.heappop(slots)
        drawn = found[parent].draw()
        if drawn is None:
            continue
        token, share = drawn
        yield parent, token, -value * share
        heapq.heappush(slots, (value * (1 - share), next(order), parent))


def _shaped(tree: Tree, draft: Sketch, found: dict[int, _Node]) -> Iterator[tuple[int, int, float]]:
    """What a tree of fixed shape holds at a level; a node whose law gives fewer tokens has fewer children."""
    places = draft.places
    for node, parent in enumerate(tree.parents):
        if not node or node in places or (at := places.get(parent, -1)) not in found:
            continue
        drawn = found[at].draw()
        if drawn is not None:
            token, share = drawn
            places[node] = len(draft.tree)
            yield at, token, found[at].value * share


def _entropy(law: torch.Tensor) -> float:
    return float(-(law * law.clamp_min(1e-300).log()).sum())
