"""What a cache site stores, counted: which tokens left the tail, what survived, how many pages and bits that is."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import sympy

from ..encoding import Dense, Encoding, Sign
from .code import Code
from .estimate import Estimate
from .hyper import Hyper
from .options import Merge, Predict, Retrieve, Rope, Select, Tier
from .score import Score

PAGE_BITS = 96  # of a page and KV head: tokens held, position of the first, and the entry in the page table
POSITION_BITS = 32  # one int32 for each token of the body whose position its page does not imply
BIAS_BITS = 32  # one float32 for each token that may stand for several
BOUND_BITS = 16  # one float16 for the least and the greatest of each channel of a page

Length: TypeAlias = int | sympy.Expr


def _least(a: Length, b: Length) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Min(a, b)


def _greatest(a: Length, b: Length) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Max(a, b)


def _up(fraction: float, of: Length) -> Any:
    """ceil(fraction · of), exactly for a fraction that is written in decimals."""
    exact = Fraction(str(fraction))
    return -(-(exact.numerator * of) // exact.denominator)


class Counts(NamedTuple):
    """Stored tokens per KV head, by segment; of the body, the most that any head holds."""

    sink: int
    body: int
    tail: int


@dataclass(frozen=True)
class Geometry:
    """The options of a site (see `Site`), and what follows from them by arithmetic."""

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    dense: str = "float32"
    sink: int = 0
    tail: int | None = None
    page: int = 64
    keys: Encoding | None = None
    values: Encoding | None = None
    select: Select | None = None
    tiers: tuple[Tier, ...] = ()
    hold: int | None = None
    frame: str = "post"
    rope: Rope | None = None
    compact: bool = False
    merge: Merge | None = None
    retrieve: Retrieve | None = None
    code: Code | None = None
    hyper: Hyper | None = None
    predict: Predict | None = None
    score: Score | None = None
    scale: float | None = None
    softcap: float | None = None
    schedule: str = "chunks"
    estimate: Estimate | None = None

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def attention_scale(self) -> float:
        """What logits are multiplied by."""
        return self.key_dim**-0.5 if self.scale is None else self.scale

    @property
    def at_prompt(self) -> bool:
        """Whether the tokens of a prompt are chosen together when it ends."""
        return self.select is not None and self.select.when != "page"

    @cached_property
    def survivors(self) -> int:
        """Tokens of a page that survive when it leaves the tail, per KV head."""
        if self.select is None or self.select.when != "page":
            return self.page
        return 0 if self.select.budget == 0 else int(_up(self.select.keep, self.page))

    @cached_property  # asked at every step, and fractions are slow
    def caps(self) -> tuple[int, ...]:
        """Tokens that a page of each body holds."""
        if self.estimate is not None:
            return self.page, self.page
        first, *below = self.parted(self.survivors)
        return first, *(below if self._shared else [first] * len(self.tiers))

    @property
    def _shared(self) -> bool:
        """Whether tiers share what leaves the tail; else each takes what the one above lets go."""
        return any(tier.share is not None for tier in self.tiers)

    @property
    def kept(self) -> int:
        """Tokens that a page of the first body holds."""
        return self.caps[0]

    @property
    def encodings(self) -> tuple[tuple[Encoding, Encoding], ...]:
        """(keys, values) of each body."""
        dense = Dense(self.dense)
        if self.estimate is not None:  # the values of the second are 0
            signs = Sign()
            return (dense, dense), (dense, dense if signs.refuses((1, self.page, self.value_dim)) else signs)
        pairs = ((self.keys, self.values), *((tier.keys, tier.values) for tier in self.tiers))
        return tuple((keys or dense, values or dense) for keys, values in pairs)

    @property
    def key_encoding(self) -> Encoding:
        """How the first body stores keys."""
        return self.encodings[0][0]

    @property
    def value_encoding(self) -> Encoding:
        """How the first body stores values."""
        return self.encodings[0][1]

    @property
    def scattered(self) -> bool:
        """Whether the positions of a page's tokens depend on the data."""
        if self.select is None or not self.kept:
            return False
        some = self.kept < self.page or self.at_prompt
        return some and (self.select.scattered or len(self.caps) > 1)

    @property
    def places(self) -> bool:
        """Whether the positions of single body tokens are stored: where data decides them, and somebody reads them."""
        if self.estimate is not None:  # draws go by positions
            return True
        if not self.scattered or self.compact or self.select is None:
            return False
        score = self.select.score
        dated = score.by in ("stride", "random") or score.normalize == "count"  # who goes by positions, again and again
        return (dated and self.select.when == "overflow") or self.window is not None or self.frame == "pre"

    @property
    def weighs(self) -> bool:
        """Whether every body token carries a bias of its logit: it may stand for several."""
        return self.merge is not None or self.estimate is not None

    @property
    def unrotates(self) -> Rope | None:
        """The rotation that body keys are stored without."""
        return self.rope if self.frame == "pre" else None

    @property
    def endless(self) -> bool:
        """Whether a row may go on for ever: its tokens stand at positions in a cache that does not grow."""
        budget = self.select.budget if self.select is not None and self.select.when == "page" else None
        return self.compact and budget is not None

    @property
    def watches(self) -> bool:
        """Whether the queries of the tail's tokens are kept, for scores by attention."""
        return self.select is not None and (self.select.score.by == "attention" or self.select.policy is not None)

    @property
    def running(self) -> bool:
        """Whether every body token carries the attention that it has received so far (H2O)."""
        return self.watches and self.select is not None and self.select.when == "overflow"

    def chunked(self, read: int) -> Counts:
        """Stored tokens by segment at the end of a chunk, `read` tokens into a prompt."""
        if self.select is None or not self.select.chunk or read <= self.sink:
            return Counts(0, 0, read)
        return Counts(self.sink, self.survive(read - self.sink), 0)

    def left(self, length: Length, prompt: Length = 0) -> Any:
        """Tokens beyond the sinks that have left the tail of a row of this committed length."""
        if self.tail is None or (isinstance(length, int) and length < prompt):  # before the prompt ends nothing leaves
            return 0
        if candidates := self._candidates(prompt):
            return candidates + (length - prompt) // self.page * self.page
        return _greatest(0, length - self.sink - self.tail) // self.page * self.page

    def _candidates(self, prompt: Length) -> Any:
        """Tokens of a prompt that are chosen from when it ends; 0 where there is no such choice."""
        return _greatest(0, prompt - self.sink - (self.tail or 0)) if self.at_prompt else 0

    def survive(self, candidates: Length) -> Any:
        """Tokens per KV head that survive of a prompt's candidates, on average over heads."""
        select = self.select
        if select is None or select.when == "page":
            return candidates
        if select.when == "prompt":
            wanted = _up(select.keep, candidates)
            return wanted if select.budget is None else _least(wanted, select.budget)
        if isinstance(candidates, int):
            return self.shrunk if candidates > (select.budget or 0) else candidates
        return sympy.Piecewise((self.shrunk, candidates > (select.budget or 0)), (candidates, True))

    @property
    def shrunk(self) -> int:
        """Body tokens after an overflow."""
        assert self.select is not None
        return int(_up(self.select.keep, self.select.budget or 0))

    def held(self, length: Length, prompt: Length = 0) -> list[Any]:
        """Tokens per KV head of each body; where heads differ, what they have on average, or at most (estimate)."""
        return [chosen + paged for chosen, paged in self._held(length, prompt)]

    def _held(self, length: Length, prompt: Length) -> list[tuple[Any, Any]]:
        """For each body the tokens that a prompt's choice, and pages later on, left there."""
        if not self.kept or self.tail is None:
            return [(0, 0)] * len(self.caps)
        if self.estimate is not None:
            return [(_least(most, self.left(length, prompt)), 0) for most in self.estimate.most]
        candidates = self._candidates(prompt)
        pages = (length - prompt if candidates else self.left(length, prompt)) // self.page
        chosen, select = self.survive(candidates), self.select
        if self.hold is not None:
            return [(0, held) for held in self._ladder(pages)]
        if select is not None and select.when == "overflow":
            return [(self._overflown(chosen, pages), 0)]
        if select is not None and select.when == "page" and select.budget is not None:
            pages = _least(pages, select.budget // self.kept)
        return [(part, cap * pages) for part, cap in zip(self.parted(chosen), self.caps, strict=True)]

    def _ladder(self, pages: Length) -> list[Any]:
        """Tokens of each tier after so many pages left the tail: the newest fill the first."""
        out: list[Any] = []
        for most in (self.hold, *(tier.budget for tier in self.tiers)):
            taken = pages if most is None else _least(pages, most // self.page)
            out.append(taken * self.page)
            pages = pages - taken
        return out

    def _overflown(self, start: Any, pages: Length) -> Any:
        """Body tokens when pages join one after the other, and it shrinks whenever it exceeds its budget."""
        assert self.select is not None
        if not pages:
            return start
        most = self.select.budget or 0
        rest = (most - start) // self.page
        if pages <= rest:
            return start + pages * self.page
        period = (most - self.shrunk) // self.page + 1
        return self.shrunk + (pages - rest - 1) % period * self.page

    def parted(self, tokens: Length) -> list[Any]:
        """How many of so many survivors each body gets; the best go to the first."""
        below = [-_up(-tier.share, tokens) for tier in self.tiers if tier.share is not None]
        return [tokens - sum(below), *(below or [0] * len(self.tiers))]

    def counts(self, length: int, prompt: int = 0) -> Counts:
        """Stored tokens by segment; sinks stand in the tail until the first page leaves."""
        left = self.left(length, prompt)
        if not left:
            return Counts(0, 0, length)
        return Counts(self.sink, sum(self.held(length, prompt)), length - self.sink - left)

    def room(self, length: int, prompt: int = 0) -> int | None:
        """Tokens up to and including the one that makes the next page leave; None: none ever will."""
        if self.tail is None:
            return None
        left: int = self.left(length, prompt)
        return self.sink + self.tail + left + self.page - length

    def pages(self, capacity: int) -> int:
        """Most pages that the first body of a row and KV head holds within this context, where heads are even."""
        if not self.kept or self.tail is None:
            return 0
        most = max(0, capacity - self.sink - self.tail) // self.page + self.at_prompt
        budget = self.select.budget if self.select and self.select.when == "page" else None
        return most if budget is None else min(most, budget // self.kept)

    def page_bits(self, number: int) -> sympy.Expr:
        """Stored bits of a page of a body for all KV heads, with what the page table and side data take."""
        cap, (keys, values) = self.caps[number], self.encodings[number]
        side = PAGE_BITS + cap * (POSITION_BITS * self.places + BIAS_BITS * self.weighs)
        side += 32 * cap * (self.running + 2 * (self.estimate is not None))
        side += 2 * BOUND_BITS * self.key_dim * (self.retrieve is not None and self.retrieve.by == "pages")
        page = keys.stored_bits((self.kv_heads, cap, self.key_dim))
        return page + values.stored_bits((self.kv_heads, cap, self.value_dim)) + self.kv_heads * side

    def bits(self, context: Length, prompt: int | None = None) -> sympy.Expr:
        """Stored bits of one sequence of `context` tokens, of which `prompt` (default: all) were its prompt.

        Codes, scales, zeros, positions, page tables and the dense rest; where heads have their own numbers of tokens,
        their average, before rounding to pages.
        """
        asked: Length = context if prompt is None else prompt
        number = Dense(self.dense).stored_bits((1,))
        token = self.kv_heads * (self.key_dim + self.value_dim) * number
        watched = self.watches * self.heads * self.key_dim * number + 32 * self.running * self.kv_heads
        left = self.left(context, asked)
        bits = token * (context - left) + watched * (context - left - self.sink * _least(1, left))
        bits += 32 * self.compact * self.kv_heads
        for body, (chosen, paged) in enumerate(self._held(context, asked) if self.kept else ()):
            cap = self.caps[body]  # the tokens of a prompt's choice and later ones do not share pages
            bits += self.page_bits(body) * (-(-chosen // cap) + -(-paged // cap))
        return sympy.sympify(bits)
