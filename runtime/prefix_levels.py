"""Which quality each chunk of a stored prefix is sent in, so that a target of time to first token is met.

CacheGen (2023, section 5.3): before each chunk, the best that still gets all the rest through in time, at the bandwidth
seen last. Text that is sent and read again loses nothing, so it comes before the finest level; the coarsest way comes
when none is quick enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import SmeltError

TEXT = -1  # in place of a level: send the chunk's tokens, and let the model read them


@dataclass(frozen=True)
class Offer:
    """One chunk: its bytes at each level, finest first, those of its tokens, and the seconds to read these again."""

    sizes: tuple[int, ...]
    text: int
    seconds: float

    def __post_init__(self) -> None:
        if not self.sizes or min((*self.sizes, self.text)) < 0 or self.seconds < 0:
            raise SmeltError("levels: a chunk needs a size for at least one level, and no negative sizes or seconds")

    def takes(self, choice: int, bandwidth: float) -> float:
        """Seconds until a chunk that is sent this way can be used."""
        if choice == TEXT:
            return self.text / bandwidth + self.seconds
        return self.sizes[choice] / bandwidth


def decide(rest: Sequence[Offer], bandwidth: float, seconds: float) -> int:
    """How to send the first of the chunks that are left, with so many seconds for all of them: a level, or `TEXT`."""
    if not bandwidth > 0:
        raise SmeltError(f"levels: the bandwidth is in bytes per second and above zero, not {bandwidth}")
    ways = [TEXT, *range(min(len(offer.sizes) for offer in rest))]
    total = {way: sum(offer.takes(way, bandwidth) for offer in rest) for way in ways}
    quickest: int = min(ways, key=lambda way: rest[0].takes(way, bandwidth))
    return next((way for way in ways if total[way] <= seconds), quickest)


def choose(offers: Sequence[Offer], bandwidth: float | Sequence[float], seconds: float) -> list[int]:
    """The choice for each chunk, in order; `bandwidth` bytes/s is one number, or what was seen before each chunk."""
    rates = [float(bandwidth)] * len(offers) if isinstance(bandwidth, int | float) else list(bandwidth)
    if len(rates) != len(offers):
        raise SmeltError(f"levels: {len(offers)} chunks need as many bandwidths, not {len(rates)}")
    out, left = [], seconds
    for number, (offer, rate) in enumerate(zip(offers, rates, strict=True)):
        out.append(decide(offers[number:], rate, left))
        left -= offer.takes(out[-1], rate)
    return out
