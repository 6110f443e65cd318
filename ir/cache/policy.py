"""Which kind of token each head looks at: the cheapest of five policies that keeps most of its attention (FastGen)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import SmeltError
from .choose import choose
from .score import LOGITS, Sums, column_mass, column_sums, probabilities, sees

NAMES = ("special", "punctuation", "frequent", "local", "full")  # each but the last adds its tokens to those before it


@dataclass(frozen=True)
class Policy:
    """FastGen's profile of a prompt (Model Tells You What to Discard, 2023, arXiv 2310.01801).

    `recover`: how much of the attention the tokens of a policy must hold, as a mean over queries, for the worst query
    head of the KV head; the paper's test compares entries of two softmax maps instead. `frequent` and `local`: shares
    of the prompt, rounded up. The defaults 0.95 and 0.3 are not verified against the paper. `queries`: newest queries
    that are asked (None: all; they count as profile only, the frequent tokens are those of the same queries).
    `special`, `punctuation`: token ids of these classes.
    """

    recover: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    queries: int | None = None
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("special", "punctuation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        for name in ("recover", "frequent", "local"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SmeltError(f"policy: {name} is a share between 0 and 1, not {getattr(self, name)}")
        if self.queries is not None and self.queries < 1:
            raise SmeltError(f"policy: queries counts the newest queries of the prompt, {self.queries} asks none")


class Chosen(NamedTuple):
    """A KV head's policy (one of `NAMES`), the tokens that it keeps, sorted, and the mass that they recover."""

    name: str
    kept: torch.Tensor
    recovered: float


def profile(
    policy: Policy,
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    scale: float,
    *,
    always: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sums: Sums = column_sums,
) -> list[Chosen]:
    """The policy of each KV head: queries q [H, n, D] at [n] over a prompt's keys k [G, S, D] at positions [S].

    `special` and `punctuation`, bool [S], say which tokens are of these classes; sinks may count as special. The tokens
    at a distance below `always` (the cache's tail) are read under every policy. A policy's tokens are those that the
    newest query would read. `sums` as in `column_mass`.
    """
    if special.shape != k_positions.shape or punctuation.shape != k_positions.shape:
        raise SmeltError(
            f"policy: special and punctuation name a class of each of {k_positions.numel()} tokens, "
            f"not {list(special.shape)} and {list(punctuation.shape)}"
        )
    asked = slice(-policy.queries if policy.queries else None, None)
    q, q_positions, stored = q[:, asked], q_positions[asked], k.shape[1]
    how = (scale, window, softcap, sinks)
    frequent = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    heavy = column_mass(q, k, q_positions, k_positions[None], *how, normalize="count", sums=sums)
    for head, index in enumerate(choose(heavy, math.ceil(policy.frequent * stored - 1e-9))):
        frequent[head, index] = True
    reach = max(always, math.ceil(policy.local * stored - 1e-9))
    classes = special.expand(k.shape[:2]), (special | punctuation).expand(k.shape[:2])
    columns = torch.stack([*classes, classes[1] | frequent, classes[1] | frequent])  # [4, G, S]
    near = (always, always, always, reach)
    held = torch.ones(len(NAMES), k.shape[0])
    held[:-1] = recovered(q, k, q_positions, k_positions, columns, near, *how).cpu()
    distance = int(q_positions.max()) - k_positions
    made = []
    for head in range(k.shape[0]):
        pick = int((held[:, head] >= policy.recover).int().argmax())
        kept = torch.ones_like(special)
        if NAMES[pick] != "full":
            kept = columns[pick, head] | (distance < near[pick])
        made.append(Chosen(NAMES[pick], kept.nonzero()[:, 0], float(held[pick, head])))
    return made


def recovered(
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    columns: torch.Tensor,
    near: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention that P sets of tokens hold: mean over queries, least of a KV head's query heads, float32 [P, G].

    Set p of a query: `columns` bool [P, G, S] and what stands at a distance below near[p]. What queries lose is summed
    by keys first: of each key the mass that it receives from queries for which it is not near is all that is needed.
    """
    heads, (groups, stored) = q.shape[0], k.shape[:2]
    lost = k.new_zeros(len(columns), groups, heads // groups, dtype=torch.float32)
    for rows in torch.arange(q.shape[1], device=q.device).split(max(1, LOGITS // max(1, heads * stored))):
        seen = sees(q_positions[rows], k_positions[None], window)
        mass = probabilities(q[:, rows], k, seen, scale, softcap, sinks)  # [G, H / G, n, S]
        distance = q_positions[rows, None] - k_positions
        far = {reach: (mass * (distance >= reach)).sum(2) for reach in set(near)}
        lost += torch.stack([(far[reach] * ~held[:, None]).sum(-1) for held, reach in zip(columns, near, strict=True)])
    return 1 - (lost / max(1, q.shape[1])).amax(-1)
