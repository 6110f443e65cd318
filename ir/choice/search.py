"""How tokens are chosen where that takes more than a draw from the model's law: one frozen record of options a kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import SmeltError


@dataclass(frozen=True)
class Search:
    """Options of a search.

    outputs: those of the program that it reads beside the logits.
    inputs: those of the program that it writes beside tokens and positions.
    ahead: tokens that it reads of the cache's room beyond what plain decoding reads.
    """

    outputs: ClassVar[tuple[str, ...]] = ()

    @property
    def ahead(self) -> int:
        """Tokens of the cache's room."""
        return 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of inputs."""
        return ()


@dataclass(frozen=True)
class Contrastive(Search):
    """Of the `candidates` likeliest tokens the one of greatest (1 - alpha) p - alpha s (Contrastive Search, Su, 2022).

    s is the greatest cosine of the hidden state behind the candidate with that behind any earlier token.
    """

    outputs: ClassVar[tuple[str, ...]] = ("hidden",)

    candidates: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.candidates < 1 or not 0 <= self.alpha <= 1:
            raise SmeltError(
                f"candidates count from 1 and alpha is between 0 and 1, not {self.candidates} and {self.alpha}"
            )

    @property
    def ahead(self) -> int:
        """The last token's state is looked at, too."""
        return 1


@dataclass(frozen=True)
class Cautious(Search):
    """Where the law's entropy H is high, the least perplexing of several trials (Cautious Next Token Prediction, 2025).

    The trials are max(1, floor(most (H - low) / (high - low))), at most `most`; H in nats. Each ends behind a token of
    `ends`, or after `length` tokens.
    """

    most: int = 10
    low: float = 0.01
    high: float = 1.5
    length: int = 16
    ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.most < 1 or self.length < 1:
            raise SmeltError(f"most and length count from 1, not {self.most} and {self.length}")
        if not 0 <= self.low < self.high:
            raise SmeltError(f"low must be at least 0 and below high, not {self.low} and {self.high}")

    def trials(self, entropy: float) -> int:
        """How many trials an entropy asks for."""
        return max(1, min(self.most, int(self.most * (entropy - self.low) / (self.high - self.low))))


@dataclass(frozen=True)
class Rerank(Search):
    """Where the law's entropy is `threshold` nats or more, the likeliest tokens by what follows them (AdaDec, 2025).

    Each of `candidates` goes on greedily for `length` tokens; the greatest mean log probability wins.
    """

    threshold: float = math.inf
    candidates: int = 3
    length: int = 5

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.length < 1 or not self.threshold >= 0:
            raise SmeltError(
                "candidates and length count from 1 and threshold is 0 or above, not "
                f"{self.candidates}, {self.length} and {self.threshold}"
            )

    @property
    def ahead(self) -> int:
        """What follows the last token's candidates is looked at, too."""
        return self.length


@dataclass(frozen=True)
class Beam(Search):
    """The likeliest of the texts that `groups` of `beams` each find, group by group (Diverse Beam Search, 2016).

    A token that earlier groups have chosen at the same place counts `diversity` nats less for each time. Texts are
    compared by log probability over length to the power of `alpha`.
    """

    beams: int = 2
    groups: int = 3
    diversity: float = 0.5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1 or self.groups < 1:
            raise SmeltError(f"beams and groups count from 1, not {self.beams} and {self.groups}")
        if not 0 <= self.diversity < math.inf or not 0 <= self.alpha < math.inf:
            raise SmeltError(f"diversity and alpha are 0 or above, not {self.diversity} and {self.alpha}")


@dataclass(frozen=True)
class Against(Search):
    """The law of a prompt against that of another one with the same answer so far (USCD, Instructive Decoding).

    From logits z and those of the other prompt, y: z - weight y, or with `amplify` (1 + weight) z - weight y. Tokens of
    less than `floor` times the greatest probability are out. This holds where the law's uncertainty, 1 - s sqrt(V) with
    s its standard deviation over the V tokens, is `uncertainty` at least: 0 is everywhere, above 1 nowhere.
    `keep`: tokens of a prompt's end that are the other prompt where a call brings none.
    """

    weight: float = 0.3
    amplify: bool = False
    floor: float = 0.0
    uncertainty: float = 0.0
    keep: int = 16

    def __post_init__(self) -> None:
        if self.keep < 1 or not 0 <= self.weight < math.inf:
            raise SmeltError(f"keep counts from 1 and weight is 0 or above, not {self.keep} and {self.weight}")
        if not 0 <= self.floor <= 1 or not self.uncertainty >= 0:
            raise SmeltError(
                f"floor is between 0 and 1 and uncertainty 0 or above, not {self.floor} and {self.uncertainty}"
            )


@dataclass(frozen=True)
class Cascade(Search):
    """The program's `draft` answers; where it was unsure the model answers anew (Language Model Cascades, 2024).

    It was sure if the `quantile` of its tokens' log probabilities is `threshold` nats or above.
    """

    threshold: float = -2.0
    quantile: float = 0.1

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or not 0 <= self.quantile <= 1:
            raise SmeltError(f"quantile is between 0 and 1, not {self.quantile}; threshold is {self.threshold}")


@dataclass(frozen=True)
class Superposed(Search):
    """Several drafts of a text out of one step (Superposed Decoding, Shen et al., 2024).

    A step reads the mixture of the embeddings of the drafts' last tokens, by the softmax of their scores. The likeliest
    `candidates` behind it go on from every draft, and the best `drafts` are kept, by their sums of
    (1 - alpha) log p + alpha log q. p is the law of those candidates at `temperature`; q weighs the shares of the token
    among what follows the last 1, 2, … tokens in counted text by `weights`. Where it never does,
    (1 - alpha) log p - penalty counts.
    """

    drafts: int = 3
    alpha: float = 0.54
    temperature: float = 0.06
    candidates: int = 9
    weights: tuple[float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12)
    penalty: float = 200.0

    def __post_init__(self) -> None:
        if self.drafts < 1 or self.candidates < self.drafts:
            raise SmeltError(f"drafts count from 1 and candidates from drafts, not {self.drafts} and {self.candidates}")
        if not 0 <= self.alpha <= 1 or not 0 < self.temperature < math.inf or not 0 <= self.penalty < math.inf:
            raise SmeltError(
                "alpha is between 0 and 1, temperature above 0 and penalty 0 or above, not "
                f"{self.alpha}, {self.temperature} and {self.penalty}"
            )
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights):
            raise SmeltError(f"weights are numbers above 0, one at least, not {list(self.weights)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """For every draft but the first its last token, and its share of the mixture."""
        return tuple(f"{what}_{at}" for at in range(1, self.drafts) for what in ("beside", "share"))


KINDS: dict[str, type[Search]] = {
    "contrastive": Contrastive,
    "cautious": Cautious,
    "rerank": Rerank,
    "beam": Beam,
    "against": Against,
    "cascade": Cascade,
    "superposed": Superposed,
}


def kind(search: Search) -> str:
    """The name of a search's kind."""
    return next(name for name, each in KINDS.items() if type(search) is each)
