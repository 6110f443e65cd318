"""Adaptive weighted rejection sampling: tokens are tested against a grammar one by one, the likeliest draws first.

Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling (Lipkin et al., 2025). The
order is that of the scores, with noise when sampling, so that tokens come as if they were drawn without replacement;
the first that the grammar admits is the one that masking would have chosen with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from ..ir.errors import SmeltError
from . import noise
from .guide import Guide
from .sampling import Sampling, not_finite

ROOMS = (8, 64, 1024)  # how many of the best scores are sorted at once, before all of them are


class Tested(Guide):
    """Holds a row to its grammar without a mask. `tests`: how many tokens it was asked about."""

    def __init__(self, matcher: object, vocabulary: int) -> None:
        super().__init__(matcher, vocabulary)
        self.tests, self.log_weight = 0, 0.0

    def shape(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Guide`: nothing is known before it is tested."""
        return logits

    def admits(self, token: int) -> bool:
        """See `Guide`."""
        self.tests += 1
        return super().admits(token)


def choose_tested(
    processed: torch.Tensor,
    sampling: Sampling,
    requests: torch.Tensor,
    positions: torch.Tensor,
    guides: Sequence[Guide],
) -> list[int]:
    """The chosen token of each row as `sampling.choose` gives it behind a mask, up to ties within float32 rounding.

    processed: float32 [R, V] without a mask. When sampling, `log_weight` of a guide grows by the log of an unbiased
    estimate of the share Z of the row's law that its grammar admits, given all that was tested before the choice.
    """
    best = processed.amax(dim=-1, keepdim=True)
    if not bool(best.isfinite().all()):
        row = int((~best[:, 0].isfinite()).nonzero()[0])
        raise not_finite(row, int(positions[row]))
    scores = processed
    if not sampling.greedy:
        scores = processed - best + noise.gumbel(sampling.seed, requests, positions, processed.shape[-1])
    return [
        _first(guide, score, None if sampling.greedy else logits, int(position))
        for guide, score, logits, position in zip(guides, scores, processed, positions, strict=True)
    ]


def _first(guide: Guide, scores: torch.Tensor, logits: torch.Tensor | None, position: int) -> int:
    """The admitted token of the best score; with logits its guide is weighed.

    Let q be the law of what is left when a token is drawn. The share of q that is admitted is q(x) [x admitted] +
    (1 - q(x)) Z' for every x, Z' being that of the rest, of which whether the next draw is admitted is an estimate
    without bias. Over the refused tokens the factors 1 - q(x) leave 1 less what all of them have.
    """
    order, refused = _order(scores), []
    for chosen in order:
        if guide.admits(chosen):
            break
        refused.append(chosen)
    else:
        raise SmeltError(f"generate: no token that the grammar admits has a probability at position {position}")
    if logits is not None and guide.log_weight is not None:
        law = logits.double() - logits.double().logsumexp(-1)
        following = next(order, None)
        more = following is not None and guide.admits(following)
        share = 1 - float(law[refused].exp().sum()) if more else float(law[chosen].exp())
        guide.log_weight += math.log(max(share, 1e-300))
    return chosen


def _order(scores: torch.Tensor) -> Iterator[int]:
    """Ids by falling score, of equal ones the lowest first; a few at a time, as few of them are looked at."""
    done, size = 0, len(scores)
    for room in (*(room for room in ROOMS if room < size), size):
        ids = scores.topk(room).indices.sort().values
        head, order = scores[ids].sort(descending=True, stable=True)
        # what ties with the last of the head may tie with tokens outside of it
        sure = room if room == size else int((head > head[-1]).sum())
        sure = min(sure, int((head > -math.inf).sum()))
        yield from ids[order[done:sure]].tolist()
        done = max(done, sure)
