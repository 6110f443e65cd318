"""How verified drafts are accepted: rules with their law, and the drafts for which each of them is valid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from ..errors import SmeltError
from .draft import Proposal

Law: TypeAlias = Literal["exact", "bounded", "unbounded"]
ANY: frozenset[Proposal] = frozenset({"fixed", "iid", "distinct"})


@dataclass(frozen=True)
class Accept:
    """A rule. `law`: how what it emits stands to the model's law; `proposals`: the drafts that it is valid for."""

    law: ClassVar[Law]
    proposals: ClassVar[frozenset[Proposal]]


@dataclass(frozen=True)
class Walk(Accept):
    """Draw at a node, descend if a child holds the draw; noise keyed by position makes it plain decoding to the token.

    The law is the model's for every drafter, and no rule without loss accepts fixed children more often.
    """

    law: ClassVar[Law] = "exact"
    proposals: ClassVar[frozenset[Proposal]] = ANY


@dataclass(frozen=True)
class Reject(Accept):
    """Accept a child with min(1, p/q), else take it out of p, and of q where children are drawn without repetition.

    One child: speculative sampling (Leviathan et al., 2023). Independent ones: SpecInfer (Miao et al., 2024). Distinct
    ones: Sequoia (Chen et al., 2024). Fixed ones: q is all on the child (EAGLE-2, 2024).
    """

    law: ClassVar[Law] = "exact"
    proposals: ClassVar[frozenset[Proposal]] = ANY


@dataclass(frozen=True)
class KSequential(Accept):
    """Accept a child with min(1, p/(ρ q)), ρ from the optimal transport's fixed point (SpecTr, Sun et al., 2023)."""

    law: ClassVar[Law] = "exact"
    proposals: ClassVar[frozenset[Proposal]] = frozenset({"iid"})


@dataclass(frozen=True)
class Typical(Accept):
    """Accept a child where p exceeds min(epsilon, alpha · exp(-entropy)) (Medusa, 2024); the law is not the model's."""

    law: ClassVar[Law] = "unbounded"
    proposals: ClassVar[frozenset[Proposal]] = ANY

    epsilon: float = 0.09
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or not self.alpha > 0:
            raise SmeltError(f"epsilon is in (0, 1] and alpha above 0, not {self.epsilon} and {self.alpha}")


@dataclass(frozen=True)
class Merge(Accept):
    """A child may borrow the probability, `delta` at most, of its nearest tokens (LANTERN, 2025, with a bound).

    Total variation is at most `delta` for each child that is tried. Table `neighbours` int32 [V, k]: the nearest tokens
    of each, nearest first, itself not among them.
    """

    law: ClassVar[Law] = "bounded"
    proposals: ClassVar[frozenset[Proposal]] = frozenset({"fixed"})

    delta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise SmeltError(f"delta is in [0, 1), not {self.delta}")


@dataclass(frozen=True)
class Near(Accept):
    """Accept a child among the `top` likeliest tokens (Blockwise Parallel Decoding, 2018), or near the best.

    regret: nats of logit that a whole path may lose against the best tokens, so that what is bounded is the regret.
    """

    law: ClassVar[Law] = "unbounded"
    proposals: ClassVar[frozenset[Proposal]] = ANY

    top: int = 1
    regret: float = 0.0

    def __post_init__(self) -> None:
        if self.top < 1 or self.regret < 0:
            raise SmeltError(f"top counts from 1 and regret from 0, not {self.top} and {self.regret}")


@dataclass(frozen=True)
class Trust(Accept):
    """Accept the whole draft; only what comes behind it is the model's (Entropy Adaptive Decoding, 2025)."""

    law: ClassVar[Law] = "unbounded"
    proposals: ClassVar[frozenset[Proposal]] = ANY


KINDS: dict[str, type[Accept]] = {
    "walk": Walk,
    "reject": Reject,
    "k_sequential": KSequential,
    "typical": Typical,
    "merge": Merge,
    "near": Near,
    "trust": Trust,
}


def kind(accept: Accept) -> str:
    """The name of a rule's kind."""
    return next(name for name, each in KINDS.items() if type(accept) is each)
