"""Accepts a drafted token for its nearest ones, too (LANTERN, Jang et al., 2025), with a bound on what this changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.ops import EMBEDDING, arguments
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from .accept import accept, valid

ROWS = 1024  # tokens whose distances are computed at once


@dataclass(frozen=True)
class Merge(Pass):
    """A drafted token is accepted with its own probability and that of its nearest tokens, together up to `delta`.

    The total variation from the model's law is at most `delta` for each child that is tried at a node.

    delta: the most that a token may borrow.
    neighbours: how many tokens are near each one, by the distance of their embeddings.

    Deviations: the paper decodes images, whose codes lie near each other for a reason; of words only the embedding says
    so. A refusal takes exactly what the token stood for, without which there is no bound; released code takes all
    neighbours, and adds their probability when decoding greedily, where nothing is borrowed here.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE  # of what is sampled; logits stay as they are
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    delta: float = 0.1
    neighbours: int = 32

    def __post_init__(self) -> None:
        decode.Merge(self.delta)
        if self.neighbours < 1:
            raise SmeltError(f"neighbours counts from 1, not {self.neighbours}")

    def requires(self, program: Program) -> Iterator[str]:
        """Fixed drafts, and an embedding of more tokens than neighbours."""
        yield from valid(program, decode.Merge(self.delta))
        tables = _embeddings(program)
        if len(tables) != 1:
            yield f"{program.name} must have one embedding of its tokens, but has {len(tables)}"
        elif program.weights[tables[0]].shape[0] <= self.neighbours:
            yield f"neighbours must be fewer than the {program.weights[tables[0]].shape[0]} tokens"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Find the neighbours and set the rule; the graph stays as it is."""
        (name,) = _embeddings(program)
        accept(program, decode.Merge(self.delta))
        assert program.decode is not None
        table = nearest(program.weights[name].dense().float(), self.neighbours)
        program.decode = program.decode.with_tables({"neighbours": table})
        return Outcome(("decode",), notes={"bytes": table.numel() * table.element_size()})


def nearest(points: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [V, count]: for each of the points [V, D] the others that are nearest to it, nearest first."""
    found = []
    for rows in torch.arange(len(points)).split(ROWS):
        distance = torch.cdist(points[rows], points)
        distance[torch.arange(len(rows)), rows] = torch.inf
        found.append(distance.topk(count, largest=False).indices.int())
    return torch.cat(found)


def _embeddings(program: Program) -> list[str]:
    """The weights that embed tokens."""
    found = [arguments(node) for node in program.calls(EMBEDDING)]
    return sorted({str(a["weight"].target) for a in found if a["ids"].target == "tokens"})
