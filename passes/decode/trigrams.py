"""Drafts from counts of three tokens in a row, searched for likely paths (ADED, Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Outcome, Samples
from ._join import Drafting, join


@dataclass(frozen=True)
class Trigrams(Drafting):
    """A table of what follows two tokens, counted in the calibration text if there is one, follows each request.

    nodes, depth: of the tree.
    successors: kept for each pair of tokens.
    search: `best` verifies the most probable paths; `mcts` is the published search.
    window, gain, cap: after a step each trigram of the last `window` tokens gains `gain`, to at most `cap`.
    prompt: what each trigram of a prompt gains at first.
    iterations, keep, explore, scale: of `mcts`, as s, top_k, c1 and c2 of the released code.

    Deviations: acceptance by the walk is exact, the released rule for sampling is not. A pair that is not known drafts
    nothing, where released code drafts a constant token. The table starts anew with every request.
    """

    kind: ClassVar[type[decode.Draft]] = decode.Trigrams

    nodes: int = 24
    depth: int = 5
    successors: int = 12
    search: Literal["best", "mcts"] = "best"
    window: int = 16
    gain: float = 0.04
    cap: float = 3.0
    prompt: float = 0.5
    iterations: int = 150
    keep: int = 24
    explore: float = 32.0
    scale: float = 8.0

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Count, and add the drafter to the decode plan; the graph stays as it is."""
        vocabulary = program.facts.get("vocabulary")
        if not vocabulary:
            raise SmeltError(f"decode.trigrams: {program.name} does not say how many tokens its vocabulary has")
        tables = None if samples is None else counted(samples.tokens, int(vocabulary), self.successors)
        join(program, self.draft(), tables)
        pairs = len(tables["trigrams.pairs"]) if tables else 0
        size = sum(t.numel() * t.element_size() for t in tables.values()) if tables else 0
        return Outcome(("decode",), notes={"most": self.draft().most, "pairs": pairs, "bytes": size})


def counted(tokens: torch.Tensor, vocabulary: int, successors: int) -> dict[str, torch.Tensor]:
    """Tables of the trigrams of tokens [N, T]: for each pair its likeliest successors and their shares, best first.

    Shares are of all that follows the pair. Among equally frequent tokens the lowest id goes first.
    """
    if tokens.shape[1] < 3:
        raise SmeltError(f"decode.trigrams: sequences of {tokens.shape[1]} tokens hold no three in a row")
    a, b, c = (tokens[:, at : tokens.shape[1] - 2 + at].reshape(-1) for at in range(3))
    triples, counts = ((a * vocabulary + b) * vocabulary + c).unique(return_counts=True)
    pairs, first, total = (triples // vocabulary).unique_consecutive(return_inverse=True, return_counts=True)
    followed = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, first, counts)
    best = torch.argsort(first * (int(counts.max()) + 1) - counts, stable=True)  # pair by pair, frequent ones first
    start = total.cumsum(0) - total
    rank = torch.arange(len(triples)) - start[first[best]]
    kept = best[rank < successors]
    rank, row = rank[rank < successors], first[kept]
    out = torch.zeros(len(pairs), successors, dtype=torch.int32)
    weights = torch.zeros(len(pairs), successors)
    out[row, rank] = (triples[kept] % vocabulary).int()
    weights[row, rank] = counts[kept].float() / followed[row]
    return {"trigrams.pairs": pairs, "trigrams.tokens": out, "trigrams.weights": weights}
