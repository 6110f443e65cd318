"""What goes on inside attention, as terms of a loss (EdgeQAT, Shen et al. 2024, arXiv:2402.10787).

Rounding costs most where it bends queries and keys, for then attention looks elsewhere. One term holds its maps to the
teacher's; the other keeps queries and keys spread out, which is where their information lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from ...ir.errors import SmeltError
from ...ir.ops import ATTENTION, CACHED_ATTENTION, arguments
from ...ir.program import Program

SITES = (ATTENTION, CACHED_ATTENTION)


def maps(part: Program) -> dict[str, fx.Node]:
    """New nodes `map_<number>` with what every site looks at, [B, H, T, S]; only the interpreter knows them."""
    found = {}
    for number, node in enumerate(part.calls(*SITES)):
        with part.graph.inserting_after(node):
            found[f"map_{number}"] = part.graph.call_function(looked_at, (), arguments(node))
    return found


def vectors(part: Program) -> dict[str, fx.Node]:
    """The queries [B, H, T, D] and keys [B, G, S, D] that every site reads."""
    sites = enumerate(part.calls(*SITES))
    return {f"{what}_{number}": arguments(node)[what] for number, node in sites for what in ("query", "key")}


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """1 - cos(map, the teacher's), over the whole map of a window and head: the mean of these over all sites.

    Raises SmeltError where the maps are not the same ones.
    """
    pairs = [(found.get(name), wanted.get(name)) for name in sorted(found.keys() | wanted.keys())]
    terms = []
    for own, other in pairs:
        if own is None or other is None or own.shape != other.shape:
            raise SmeltError(
                "tune.recover: attention holds maps to those that the recipe began with, but heads or layers have "
                "gone since: say attention: 0"
            )
        terms.append(functional.cosine_similarity(own.flatten(2), other.flatten(2), -1).mean())
    return 1 - torch.stack(terms).mean()


def narrowness(vectors: Iterable[torch.Tensor]) -> torch.Tensor:
    """-½ log(1 + var) of a query's or key's channels, [..., D] → [], as a mean over all.

    But for a constant and the 1, which keeps it finite, it is what a Gaussian of that variance has of entropy in nats,
    negative.
    """
    return torch.stack([-0.5 * each.var(-1).log1p().mean() for each in vectors]).mean()


def looked_at(key: torch.Tensor, **given: Any) -> torch.Tensor:
    """The map [B, H, T, S] of a site with these arguments: the site, reading the rows of an identity as values."""
    size = key.shape[2]
    given["value"] = torch.eye(size, dtype=key.dtype).expand(*key.shape[:2], size, size)
    op = CACHED_ATTENTION if "layer" in given else ATTENTION
    return op.reference(key=key, **given)
