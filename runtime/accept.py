"""Acceptance: from the law behind a node and what was drafted there to the token that comes, and its node if drafted.

Every rule has its law stated in `ir/decode/accept.py`; tests enumerate them. Draws are keyed by seed, request and
position, with a stream of their own for each purpose, so that a generation can be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from ..ir.decode import Accept, DecodePlan, KSequential, Merge, Near, Proposal, Reject, Trust, Typical
from . import noise
from .guide import Guide
from .reject import choose_tested
from .sampling import Sampling, choose
from .trees import Below

Came: TypeAlias = tuple[int, int | None]
"""A token, and the node that it was drafted as."""
TINY = 1e-300
COINS, REST = 0x5EED_C011, 0x5EED_4E57  # streams of noise: for accepting, for what is drawn after refusals


@dataclass(frozen=True)
class Standing:
    """Where rows stand in their walk: processed logits [R, V], request ids [R], positions [R] of the tokens to come.

    `guides` [R]: what tokens are tested against one by one, as the logits are not masked; only `Walker` does so.
    """

    processed: torch.Tensor
    sampling: Sampling
    requests: torch.Tensor
    positions: torch.Tensor
    guides: Sequence[Guide] | None = None

    def chosen(self) -> list[int]:
        """What plain decoding chooses."""
        keys = self.processed, self.sampling, self.requests, self.positions
        if self.guides is not None:
            return choose_tested(*keys, self.guides)
        plain: list[int] = choose(*keys).tolist()
        return plain

    def law(self, row: int) -> torch.Tensor:
        """The model's law, float64 [V]; all on the likeliest token when greedy."""
        logits = self.processed[row].double()
        if self.sampling.greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        return logits.softmax(-1)

    def coins(self, row: int, count: int) -> list[float]:
        """Uniform numbers in (0, 1), for each thing that may be accepted."""
        one = slice(row, row + 1)
        drawn = noise.uniform(self.sampling.seed ^ COINS, self.requests[one], self.positions[one], count)
        coins: list[float] = drawn[0].tolist()
        return coins

    def draw(self, row: int, law: torch.Tensor) -> int:
        """A token of a law float64 [V] that need not sum to one."""
        one = slice(row, row + 1)
        gumbel = noise.gumbel(self.sampling.seed ^ REST, self.requests[one], self.positions[one], len(law))
        return int((law.log() + gumbel[0]).argmax())


class Acceptor(Protocol):
    """A rule at work."""

    plain: bool
    """Whether it emits what plain decoding chooses, so that the step's kernel may choose."""

    def behind(self, at: Standing, drafted: Sequence[Below], paths: Sequence[Sequence[int]]) -> list[Came]:
        """What comes behind the last node of each row's path."""
        ...


def acceptor(plan: DecodePlan) -> Acceptor:
    """The rule of a decode plan."""
    rule: Accept = plan.accept
    if isinstance(rule, Reject):
        return Rejecter(plan.draft.proposal)
    if isinstance(rule, KSequential):
        return KSequentialTaker()
    if isinstance(rule, Typical):
        return TypicalTaker(rule)
    if isinstance(rule, Merge):
        return Merger(rule, plan.tables)
    if isinstance(rule, Near):
        return NearTaker(rule)
    if isinstance(rule, Trust):
        return Truster()
    return Walker()


class Walker:
    """`Walk`: what plain decoding chooses."""

    plain = True

    def behind(self, at: Standing, drafted: Sequence[Below], paths: Sequence[Sequence[int]]) -> list[Came]:
        """See `Acceptor`."""
        return [(token, _node(below, token)) for token, below in zip(at.chosen(), drafted, strict=True)]


class Truster:
    """`Trust`: a drafted token where there is one that may stand here, else what plain decoding chooses."""

    plain = False

    def behind(self, at: Standing, drafted: Sequence[Below], paths: Sequence[Sequence[int]]) -> list[Came]:
        """See `Acceptor`."""
        plain = Walker().behind(at, drafted, paths)
        return [
            (below.tokens[0], below.nodes[0])
            if below.tokens and at.processed[row, below.tokens[0]] > -math.inf
            else came
            for row, (below, came) in enumerate(zip(drafted, plain, strict=True))
        ]


class Single:
    """A rule that looks at one row at a time."""

    plain = False

    def behind(self, at: Standing, drafted: Sequence[Below], paths: Sequence[Sequence[int]]) -> list[Came]:
        """See `Acceptor`."""
        return [self.one(at, row, below, paths[row]) for row, below in enumerate(drafted)]

    def one(self, at: Standing, row: int, below: Below, path: Sequence[int]) -> Came:
        """What comes behind a row's node."""
        raise NotImplementedError


class Trying(Single):
    """A rule that tries the children in the order of the draft, each with a probability, and draws if none is taken.

    Greedy decoding has nothing to try: it walks.
    """

    def behind(self, at: Standing, drafted: Sequence[Below], paths: Sequence[Sequence[int]]) -> list[Came]:
        """See `Acceptor`."""
        if at.sampling.greedy:
            return Walker().behind(at, drafted, paths)
        return super().behind(at, drafted, paths)

    def one(self, at: Standing, row: int, below: Below, path: Sequence[int]) -> Came:
        """See `Single`."""
        law = at.law(row)
        if not below.tokens:
            return at.draw(row, law), None
        taken, rest = self.trials(law, below.tokens, None if below.law is None else below.law.double())
        for token, node, share, coin in zip(below.tokens, below.nodes, taken, at.coins(row, len(taken)), strict=True):
            if coin < share:
                return token, node
        return at.draw(row, rest), None

    def trials(
        self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None
    ) -> tuple[list[float], torch.Tensor]:
        """How probably each child is accepted if all before it were refused, and what is drawn from behind them all.

        p float64 [V], the model's law; q the law that the children were drawn from. What is drawn from need not sum to
        one.
        """
        raise NotImplementedError


class Rejecter(Trying):
    """`Reject`, for children of a kind."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal

    def trials(
        self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None
    ) -> tuple[list[float], torch.Tensor]:
        """See `Trying`: each refusal takes from p what could have been accepted."""
        taken = []
        for token in tokens:
            whole = float(p.sum())
            if not whole > 0:  # nothing was left to refuse
                taken.append(1.0)
                continue
            p = p / whole
            if q is None or self.proposal == "fixed":
                taken.append(float(p[token]))
                p = _without(p, token)
                continue
            taken.append(min(1.0, float(p[token] / q[token])))
            p = (p - q).clamp_min(0.0)
            if self.proposal == "distinct":
                q = _without(q, token)
                q = q / q.sum().clamp_min(TINY)
        return taken, p


class KSequentialTaker(Trying):
    """`KSequential`."""

    def trials(
        self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None
    ) -> tuple[list[float], torch.Tensor]:
        """See `Trying`."""
        if q is None:
            raise ValueError("k-sequential selection needs the law of the draft")
        k = len(tokens)
        rho = fixed_point(p, q, k)
        shared = torch.minimum(q, p / rho)
        beta = float(shared.sum())
        rest = (p - shared * ((1 - (1 - beta) ** k) / beta)).clamp_min(0.0) if beta else p
        return [min(1.0, float(p[token] / (rho * q[token]))) for token in tokens], rest


def fixed_point(p: torch.Tensor, q: torch.Tensor, k: int, rounds: int = 60) -> float:
    """The least ρ in [1, k] with 1 - (1 - β)^k <= ρ β, where β = Σ min(q, p / ρ), by bisection."""

    def enough(rho: float) -> bool:
        beta = float(torch.minimum(q, p / rho).sum())
        return 1 - (1 - beta) ** k <= rho * beta

    low, high = 1.0, float(k)
    if enough(low):
        return low
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


class TypicalTaker(Single):
    """`Typical`: the likeliest child that is typical, else what plain decoding chooses."""

    def __init__(self, rule: Typical) -> None:
        self.rule = rule

    def one(self, at: Standing, row: int, below: Below, path: Sequence[int]) -> Came:
        """See `Single`."""
        p = at.law(row)
        entropy = float(-(p * p.clamp_min(TINY).log()).sum())
        least = min(self.rule.epsilon, self.rule.alpha * math.exp(-entropy))
        best = max(zip(below.tokens, below.nodes, strict=True), key=lambda each: float(p[each[0]]), default=None)
        if best is not None and float(p[best[0]]) > least:
            return best
        return _plainly(at, row, below)


class Merger(Trying):
    """`Merge`: a child stands for itself and for the nearest tokens that have `delta` together at most."""

    def __init__(self, rule: Merge, tables: Mapping[str, torch.Tensor]) -> None:
        self.delta, self.neighbours = rule.delta, tables["neighbours"]

    def trials(
        self, p: torch.Tensor, tokens: Sequence[int], q: torch.Tensor | None
    ) -> tuple[list[float], torch.Tensor]:
        """See `Trying`: a refusal takes all that the child stood for."""
        taken, left = [], 1.0
        for token in tokens:
            near = self.neighbours[token].long()
            near = near[p[near].cumsum(0) <= self.delta]
            if not p[token] > 0:  # it may not stand here, or an earlier child stood for it
                near = near[:0]
            merged = torch.cat((near[near != token], torch.tensor([token])))
            share = float(p[merged].sum())
            taken.append(share / left if left > 0 else 1.0)
            left -= share
            p = p.index_fill(0, merged, 0.0)
        return taken, p


class NearTaker(Single):
    """`Near`: the likeliest child that is near enough, else what plain decoding chooses."""

    def __init__(self, rule: Near) -> None:
        self.rule = rule
        self._lost: dict[tuple[int, int], float] = {}

    def one(self, at: Standing, row: int, below: Below, path: Sequence[int]) -> Came:
        """See `Single`."""
        logits, request = at.processed[row], int(at.requests[row])
        lost = self._lost.get((request, len(path)), 0.0) if len(path) > 1 else 0.0
        best = max(zip(below.tokens, below.nodes, strict=True), key=lambda each: float(logits[each[0]]), default=None)
        if best is not None:
            regret = float(logits.max() - logits[best[0]])
            among = int((logits > logits[best[0]]).sum()) < self.rule.top if self.rule.top > 1 else regret == 0
            if regret < math.inf and (among or lost + regret <= self.rule.regret):
                self._lost[request, len(path) + 1] = lost + regret
                return best
        return _plainly(at, row, below)


def _without(law: torch.Tensor, token: int) -> torch.Tensor:
    return law.index_fill(0, torch.tensor([token]), 0.0)


def _plainly(at: Standing, row: int, below: Below) -> Came:
    one = slice(row, row + 1)
    token = int(choose(at.processed[one], at.sampling, at.requests[one], at.positions[one]))
    return token, _node(below, token)


def _node(below: Below, token: int) -> int | None:
    return next((node for held, node in zip(below.tokens, below.nodes, strict=True) if held == token), None)
