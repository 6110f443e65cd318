"""What a drafter is asked, and what it answers: a small tree of tokens for each row. It decides no acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass
class Drafted:
    """A row's draft. Node 0 is the pending token; `parents[i] < i` is the parent of node i.

    `likely`: for each node how probable it seems that it is reached, for whoever has to choose among drafts.
    `laws` float32 [nodes, V]: the law that the children of each node were drawn from, where they were drawn.
    `draws`: (parent, node) of each draw in order, where the same token may have come more than once.
    `aside`: rows behind the tree that no token is accepted of.
    """

    tokens: list[int]
    parents: Sequence[int]
    likely: Sequence[float] | None = None
    laws: torch.Tensor | None = None
    draws: list[tuple[int, int]] | None = None
    aside: Aside | None = None

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Drafted:
        """Tokens one behind the other, the pending one first."""
        return cls(list(tokens), (0, *range(len(tokens) - 1)))


@dataclass
class Aside:
    """Rows that a drafter runs beside its tree: tokens, places behind the pending token, and which rows each one sees.

    `seen` bool [rows, 1 + rows]: column 0 is a node with all above it, column j + 1 row j.
    `nodes`: which node that is for each row; the pending token's by default.
    """

    tokens: list[int]
    depths: list[int]
    seen: torch.Tensor
    nodes: Sequence[int] | None = None


class Outputs(Mapping[str, torch.Tensor]):
    """One row's part of a step's outputs [B, ...], made when somebody asks for it."""

    def __init__(self, outputs: Mapping[str, torch.Tensor], row: int) -> None:
        self._outputs, self._row = outputs, row

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._outputs[name][self._row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)


@dataclass(frozen=True)
class Verified:
    """What a step told of one row: tokens that it committed, the accepted nodes, and the model's outputs [T, ...].

    `chosen` [T]: the token that the model chooses behind each node, where a kernel chose.
    """

    fresh: Sequence[int]
    path: Sequence[int]
    outputs: Mapping[str, torch.Tensor]
    chosen: Sequence[int] | None = None


def chosen_behind(verified: Verified, nodes: range) -> list[int]:
    """The tokens that the model chooses behind these rows of a step; the likeliest where no kernel chose."""
    rows = slice(nodes.start, nodes.stop)
    if verified.chosen is not None:
        return [max(0, token) for token in verified.chosen[rows]]
    likeliest: list[int] = verified.outputs["logits"][rows].argmax(-1).tolist()
    return likeliest


class Drafter:
    """Proposes tokens for the rows of one generation, and learns from what became of them."""

    harvests = False
    """Whether it wants to see all logits of prompts and steps."""
    watches = False
    """Whether it wants to see the model's other outputs at every token that it did not draft behind."""
    fixed = False
    """Whether every draft has the same shape."""

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        """The row's prompt, and the first token, which is pending; later on tokens that came without a draft."""

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Tokens [n] and the logits [n, V] behind each, as the model gave them; drafts that were wrong included."""

    def watch(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        """The model's outputs [n, ...] but the logits at the row's next tokens, before `begin` tells of these."""

    def observe(self, row: int, verified: Verified) -> None:
        """A verified step of the row, the prompt's last token as the first of them (with nothing fresh)."""

    def propose(self, row: int) -> Drafted:
        """The row's draft behind its pending token, the last that it was told of."""
        raise NotImplementedError

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        """The drafts of these rows."""
        return {row: self.propose(row) for row in rows}


class History(Drafter):
    """A drafter that remembers each row's tokens, the pending one last."""

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self.extend(row, tokens)

    def observe(self, row: int, verified: Verified) -> None:
        if verified.fresh:
            self.extend(row, verified.fresh)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Further tokens of the row."""
        self.tokens[row] += tokens


class Growing:
    """A tree that grows by paths, equal prefixes once."""

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.likely = [root], [0], [1.0]
        self._known: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether a token stands behind a node."""
        return place in self._known

    def add(self, parent: int, token: int, likely: float) -> int:
        """The node of a token behind `parent`; one that stands there already keeps the larger probability."""
        node = self._known.get((parent, token))
        if node is None:
            node = self._known[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.likely.append(likely)
        elif likely > self.likely[node]:
            self.likely[node] = likely
        return node

    def drafted(self) -> Drafted:
        """The draft."""
        return Drafted(self.tokens, tuple(self.parents), self.likely)


@lru_cache(maxsize=512)
def ancestors(parents: tuple[int, ...], width: int) -> torch.Tensor:
    """bool [width, width]: [i, j] where j is i or stands above it; rows beyond the tree see themselves."""
    seen = torch.eye(width, dtype=torch.bool).numpy()
    for node in range(1, len(parents)):
        seen[node] |= seen[parents[node]]
    return torch.from_numpy(seen)


@lru_cache(maxsize=512)
def depths(parents: tuple[int, ...], width: int) -> torch.Tensor:
    """int64 [width]: distance of every node from the root; 0 beyond the tree."""
    depth = [0] * width
    for node in range(1, len(parents)):
        depth[node] = depth[parents[node]] + 1
    return torch.tensor(depth)
