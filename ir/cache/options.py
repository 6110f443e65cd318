"""What a cache site may ask for beside its encodings: tiers, a choice of tokens, rotations, and partial reading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch

from ..encoding import Encoding
from ..errors import SmeltError
from ..ops.rotary import rotary
from .policy import Policy
from .score import Score


@dataclass(frozen=True)
class Rope:
    """How keys were turned by their positions: dims i and i + R by position · `inverse[i]`; dims from 2 R on pass.

    R = len(inverse). The layout of `smelt::rotary` (RoFormer, section 3.2); its scale on cos and sin stays in the keys.
    """

    inverse: tuple[float, ...]

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys x [..., n, D] turned by the angles of `positions` [..., n] or [n], which may be negative, in float32."""
        rows, (tokens, dim) = math.prod(x.shape[:-2]), x.shape[-2:]
        at = positions.expand(x.shape[:-1]).reshape(rows, tokens)
        inverse = torch.tensor(self.inverse, device=x.device)
        return rotary(x.float().reshape(rows, 1, tokens, dim), at, inverse).view(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Tier:
    """One more body below the first: which tokens it gets, and how it stores them.

    `share` s: of the tokens that leave the tail and survive, the fraction s that scores next best (ZipCache's tiers).
    None: what the body above lets go when it holds more than its budget, decoded and encoded again, so that bits fall
    with age (the staircase of SAQ). `budget`: most tokens per KV head; older pages go to the next tier, or are gone.
    """

    keys: Encoding | None = None
    values: Encoding | None = None
    share: float | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not 0.0 < self.share < 1.0:
            raise SmeltError(f"tier: share is a fraction between 0 and 1, not {self.share}")
        if self.budget is not None and self.budget < 1:
            raise SmeltError(f"tier: a budget of {self.budget} tokens holds nothing; leave the tier out")
        if self.share is not None and self.budget is not None:
            raise SmeltError("tier: a share goes by score and a budget by age: leave one of the two out")


@dataclass(frozen=True)
class Select:
    """Which tokens survive when they leave the tail, for each KV head alone.

    `when`: `page` chooses among each page that leaves. `prompt` chooses once, over all of a prompt but sinks and tail;
    pages that leave later stay whole. `overflow` chooses over the body and what joins it, at the end of the prompt and
    whenever the body holds more than `budget`; then `keep` of the budget survives.
    `keep`: surviving fraction (of the page, or of the prompt's candidates). `budget`: most body tokens per KV head;
    with `page` the oldest whole pages go when it is exceeded, so that memory is constant (0: nothing is kept).
    `heads`: `even` gives every KV head the same number, `adaptive` shares a layer's sum by score, each head keeping
    `floor` of its even part (Ada-KV, 2024), `policy` asks `policy` for each head (FastGen, 2023).
    `chunk`: a prompt is read in chunks of so many tokens, each with the question, the newest `queries` tokens of the
    prompt, behind it; after each chunk the question chooses among what was kept and the chunk, and is taken back
    (Finch, 2024). None: the prompt is one chunk.
    """

    score: Score
    keep: float = 1.0
    budget: int | None = None
    when: Literal["page", "prompt", "overflow"] = "page"
    heads: Literal["even", "adaptive", "policy"] = "even"
    floor: float = 0.2
    policy: Policy | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            object.__setattr__(self, "score", Score(by=self.score))  # type: ignore[arg-type]  # a name will do
        for fault in self._faults():
            raise SmeltError(f"select: {fault}")

    def _faults(self) -> Iterator[str]:
        if not 0.0 <= self.keep <= 1.0:
            yield f"keep is a fraction between 0 and 1, not {self.keep}"
        if self.budget is not None and self.budget < 0:
            yield f"budget counts tokens, {self.budget} is negative; 0 keeps nothing beyond the tail"
        if self.when not in ("page", "prompt", "overflow"):
            yield f"unknown event '{self.when}'; known: page, prompt, overflow"
        if self.heads not in ("even", "adaptive", "policy"):
            yield f"unknown division '{self.heads}' among heads; known: even, adaptive, policy"
        if self.when == "overflow" and not self.budget:
            yield "when: overflow needs the budget that can be overflown"
        score = self.score
        running = score.by == "attention" and self.when == "overflow"
        if running and (score.queries is not None or score.probes or score.pool > 1 or score.combine != "none"):
            yield "when: overflow sums the attention of all queries: queries, probes, pool and combine do not apply"
        if running and score.normalize == "length":
            yield "when: overflow sums attention, or takes its mean with normalize: count: length does not apply"
        if score.by == "centers" and self.when != "prompt":
            yield "centers are found among all tokens of a prompt: it needs when: prompt"
        if self.heads != "even" and self.when != "prompt":
            yield f"heads: {self.heads} divides a prompt's tokens: it needs when: prompt"
        if (self.heads == "policy") != (self.policy is not None):
            yield "heads: policy and the option policy come together"
        if self.chunk is not None:
            yield from self._chunk_faults(self.chunk)
        if self.when == "page" and self.score.by not in (
            "key_norm",
            "value_norm",
            "recency",
            "stride",
            "random",
            "attention",
        ):
            yield f"a page that leaves has no score by {self.score.by}: use when: prompt or overflow"

    def _chunk_faults(self, chunk: int) -> Iterator[str]:
        score = self.score
        if chunk < 1:
            yield f"a chunk of {chunk} tokens reads nothing of the prompt; null reads it as one chunk"
        if self.when != "prompt" or self.heads != "even":
            yield "chunk reads a prompt, and every head keeps as many of its tokens: it needs when: prompt, heads: even"
        if score.by != "attention" or (score.queries or 0) < 1 or score.probes:
            yield (
                "the question behind a chunk chooses by its attention: chunk needs a score by attention whose queries "
                "are a number of tokens, without probes"
            )

    @property
    def question(self) -> int:
        """Newest tokens of a prompt that stand behind each chunk of it; 0 where it is read as one."""
        return int(self.score.queries or 0) if self.chunk is not None else 0

    @property
    def scattered(self) -> bool:
        """Whether data decides which tokens survive."""
        return self.score.by != "recency" or self.heads == "policy"


@dataclass(frozen=True)
class Merge:
    """What becomes of tokens that are not kept: the best `share` of them join their nearest survivor (EMS, 2024).

    `cover`: of these only as many of each head as it takes for survivors and merged tokens to hold that share of the
    head's score; the rest is irrelevant to it and gone. None: `share` alone decides, alike in all heads.
    Keys are averaged un-rotated; `values_only` leaves the survivors' keys as they are. Tokens whose cosine to every
    survivor is below `threshold` go to the zero class, which is dropped. A survivor of n tokens gets ln n on its logit.
    """

    share: float = 0.5
    threshold: float = 0.0
    values_only: bool = False
    cover: float | None = None

    def __post_init__(self) -> None:
        if self.cover is not None and not 0.0 < self.cover <= 1.0:
            raise SmeltError(f"merge: cover is a share of a head's score above 0, at most 1, not {self.cover}")
        if not 0.0 < self.share <= 1.0:
            raise SmeltError(f"merge: share is a fraction of the tokens that are not kept, not {self.share}")
        if not -1.0 <= self.threshold < 1.0:
            raise SmeltError(f"merge: threshold is a cosine below 1, not {self.threshold}")


@dataclass(frozen=True)
class Predict:
    """A layer stores what a forecast from the layer before misses (AQUA-KV, 2025); `first`: nothing is before it."""

    first: bool = False


@dataclass(frozen=True)
class Retrieve:
    """Which entries of the body a query reads; sinks, tail and new tokens are always read, and nothing is deleted.

    `by`: `pages` bounds every page's logits by its channels' extremes and reads the best pages, for each KV head
    (Quest, 2024). `scan` computes all logits of the body, sums the softmax over heads, and reads the best tokens, one
    list for the layer (TokenSelect, 2024). `reuse` reads the list of an earlier layer that scans (TidalDecode, 2024);
    `dense` there reads everything and leaves a list for later ones.
    `budget`: tokens of the body that are read. `source`: the layer whose list is reused.
    """

    by: Literal["pages", "scan", "dense", "reuse"]
    budget: int
    source: int | None = None

    def __post_init__(self) -> None:
        if self.by not in ("pages", "scan", "dense", "reuse"):
            raise SmeltError(f"retrieve: unknown method '{self.by}'; known: pages, scan, dense, reuse")
        if self.budget < 1:
            raise SmeltError(f"retrieve: a budget of {self.budget} tokens reads nothing of the body")
        if (self.by == "reuse") != (self.source is not None):
            raise SmeltError("retrieve: reuse and source come together")


def plain(value: Any) -> Any:
    """The JSON form of options: encodings as their specs, dataclasses as mappings of what is not the default."""
    if isinstance(value, Encoding):
        return value.spec()
    if is_dataclass(value) and not isinstance(value, type):
        told = {f.name: plain(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default}
        return value.by if isinstance(value, Score) and not told.keys() - {"by"} else told
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
