"""Attention of a whole prompt in almost linear time: HyperAttention (Han et al., 2023, arXiv:2310.05869), in PyTorch.

The tokens are halved again and again. What the queries of a second half see of its first half is no longer read whole:
queries and keys are sorted by the bucket of an angular hash, cut into as many blocks, and each block of queries reads
its own block of keys, where the large logits are, and a sample of the others, which stands for them all by a larger
logit. Ranges of up to `min_seq_len` tokens are read exactly, and so are the first tokens and the nearest ones, whatever
the hash says. Parts are joined by their log-sum-exp. What is here is the meaning; kernels follow it part by part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import SmeltError

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio
FRACTION = 24  # bits of a drawn fraction: positions of samples stay below 2^63
MOST_PROJECTIONS, MOST_BLOCK = 12, 1024  # a kernel sorts through 2^12 counters, and holds a block of queries


@dataclass(frozen=True)
class Hyper:
    """How a layer reads prompts of more than `min_seq_len` tokens; shorter ones, and all later steps, are exact.

    block: keys and queries that share a bucket of the sorted order. sample: keys that stand for the others of a block.
    projections: bits of the hash. sink: first tokens, which every query reads exactly.
    """

    block: int = 256
    sample: int = 256
    projections: int = 8
    min_seq_len: int = 2048
    sink: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise SmeltError(f"hyper: {fault}")

    def _faults(self) -> Iterator[str]:
        if not 1 <= self.block <= MOST_BLOCK:
            yield f"block counts 1 to {MOST_BLOCK} tokens, not {self.block}"
        if self.sample < 1:
            yield f"a sample of {self.sample} keys cannot stand for the others: it needs at least 1"
        if not 1 <= self.projections <= MOST_PROJECTIONS:
            yield f"projections counts 1 to {MOST_PROJECTIONS} bits, not {self.projections}"
        if self.min_seq_len < self.block:
            yield f"min_seq_len {self.min_seq_len} is below one block of {self.block}: raise it, or lower block"
        if not 0 <= self.sink < self.block:
            yield f"sink counts 0 to {self.block - 1} tokens, fewer than a block, not {self.sink}"


class Rectangle(NamedTuple):
    """Queries [middle, end) that see the keys [first, middle), all of them."""

    first: int
    middle: int
    end: int

    def blocks(self, options: Hyper) -> int:
        """Blocks of keys, and so of queries; the last block of keys may be shorter."""
        return -(-(self.middle - self.first) // options.block)

    def queries(self, block: int, blocks: int) -> range:
        """Ranks of a block's queries in sorted order: equal shares, none longer than a block of keys."""
        many = self.end - self.middle
        return range(-(-block * many // blocks), -(-(block + 1) * many // blocks))


def levels(tokens: int, options: Hyper) -> list[list[Rectangle]]:
    """The rectangles that are approximated, the smallest first; those of one level share no query."""
    found: list[list[Rectangle]] = []
    _halve(0, tokens, 0, options, found)
    return found[::-1]


def starts(tokens: int, options: Hyper) -> list[int]:
    """For each block of queries by position, from which key on it reads exactly: all of its range, and a block more."""
    found: list[list[Rectangle]] = []
    ranges = _halve(0, tokens, 0, options, found)
    first = [max(0, min(low, at - options.block)) for low, high in ranges for at in range(low, high, options.block)]
    return [0 if start <= options.sink else start for start in first]


def _halve(low: int, high: int, depth: int, options: Hyper, found: list[list[Rectangle]]) -> list[tuple[int, int]]:
    """Exact ranges in order. First halves hold whole blocks, and so are the longer ones; any length will do."""
    if high - low <= options.min_seq_len:
        return [(low, high)] if low < high else []
    middle = low + -(-(high - low) // (2 * options.block)) * options.block
    if len(found) == depth:
        found.append([])
    found[depth].append(Rectangle(low or options.sink, middle, high))
    return [
        *_halve(low, middle, depth + 1, options, found),
        *_halve(middle, high, depth + 1, options, found),
    ]


def scramble(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words (int64 that hold them) without structure: lowbias32 (Wellons, 2018)."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & WORD
    x = ((x ^ x >> 15) * 0x846CA68B) & WORD
    return x ^ x >> 16


def draw(start: int, *counters: int | torch.Tensor) -> torch.Tensor:
    """A 32-bit word that is a pure function of a seed and counters, which broadcast."""
    word = scramble(torch.tensor(start & WORD))
    for counter in counters:
        word = scramble((word + (torch.as_tensor(counter) + 1) * GOLDEN) & WORD)
    return word


def key_of(options: Hyper, seed: int) -> int:
    """The seed of all draws of a site: `seed` tells sites of one plan apart."""
    return int(draw(options.seed, seed))


def planes(options: Hyper, dim: int, seed: int) -> torch.Tensor:
    """Normals of the hash, float32 [projections, D], Gaussian (Box-Muller on drawn words)."""
    index = torch.arange(options.projections * dim)
    first, second = (draw(key_of(options, seed), which, index).double().add(0.5) / 2**32 for which in (0, 1))
    normal = torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)
    return normal.float().view(options.projections, dim)


def buckets(x: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
    """int64 [..., n]: where the signs of x [..., n, D] stand in the Gray code, whose neighbours differ in one sign.

    Sums are float64, so that whoever adds in another order gets the same signs.
    """
    signs = (x.double() @ normals.to(x.device).double().T) > 0
    code = (signs.long() << torch.arange(len(normals), device=x.device)).sum(-1)
    for shift in (1, 2, 4, 8):
        code = code ^ code >> shift
    return code


def sample(outside: int, options: Hyper, key: int, head: int, middle: int, block: int) -> torch.Tensor:
    """Ranks int64 [m] of the keys that stand for all `outside` of a block: a uniform one of each m-th of them.

    Every key is as likely as any other, and where the sample covers all, each is taken once.
    """
    many = min(options.sample, outside)
    index = torch.arange(many)
    inside = draw(key, 2, head, middle, block, index) >> (32 - FRACTION)
    return (((index << FRACTION) + inside) * outside // max(many, 1)) >> FRACTION


def part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [t, D] (scaled) over the seen [t, n] of some keys, and its log-sum-exp; zeros where none is."""
    logits = q @ k.T
    logits = (logits if bias is None else logits + bias).masked_fill(~seen, float("-inf"))
    total = torch.logsumexp(logits, -1)
    weights = torch.where(seen, torch.exp(logits - total[:, None]), 0.0)
    return weights @ v, total


def hyper_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, options: Hyper, seed: int = 0
) -> torch.Tensor:
    """Causal attention of q [H, T, D] over k [G, T, D] and v [G, T, E] of the same tokens → [H, T, E], in float32.

    The same arguments give the same result; `seed` tells sites apart.
    """
    heads, tokens, dim = q.shape
    group, normals = heads // k.shape[0], planes(options, dim, seed)
    halves, first = levels(tokens, options), starts(tokens, options)
    of_queries, of_keys = buckets(q, normals), buckets(k, normals)
    out = torch.empty(heads, tokens, v.shape[-1], device=q.device)
    for head in range(heads):
        g = head // group
        query, keys, values = q[head].float() * scale, k[g].float(), v[g].float()
        mixed, total = _exact(query, keys, values, first, options)
        for rectangle in (rectangle for level in halves for rectangle in level):
            sorted_q = rectangle.middle + torch.sort(of_queries[head, slice(*rectangle[1:])], stable=True).indices
            sorted_k = rectangle.first + torch.sort(of_keys[g, slice(*rectangle[:2])], stable=True).indices
            for at, seen, bias in _blocks(rectangle, sorted_k, options, key_of(options, seed), head):
                mine = sorted_q[at.start : at.stop]
                near = torch.tensor([first[i // options.block] for i in mine.tolist()], device=q.device)
                new, mass = part(query[mine], keys[seen], values[seen], seen < near[:, None], bias.to(q.device))
                both = torch.logaddexp(total[mine], mass)
                mixed[mine] = mixed[mine] * (total[mine] - both).exp()[:, None] + new * (mass - both).exp()[:, None]
                total[mine] = both
        out[head] = mixed
    return out


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: list[int], options: Hyper
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read exactly by one head: from the block's start to the query itself, and the sinks in front of it."""
    mixed, total = torch.empty(len(q), v.shape[-1], device=q.device), torch.empty(len(q), device=q.device)
    for block, start in enumerate(first):
        low = block * options.block
        at = torch.arange(low, min(low + options.block, len(q)), device=q.device)
        keys = torch.cat([torch.arange(min(options.sink, start)), torch.arange(start, int(at[-1]) + 1)]).to(q.device)
        mixed[at], total[at] = part(q[at], k[keys], v[keys], keys <= at[:, None])
    return mixed, total


def _blocks(
    rectangle: Rectangle, sorted_k: torch.Tensor, options: Hyper, key: int, head: int
) -> Iterator[tuple[range, torch.Tensor, torch.Tensor]]:
    """For each block: the ranks of its queries, the keys it reads, and what is added to their logits."""
    many, blocks = len(sorted_k), rectangle.blocks(options)
    for block in range(blocks):
        low, high = block * options.block, min((block + 1) * options.block, many)
        outside = many - (high - low)
        ranks = sample(outside, options, key, head, rectangle.middle, block)
        ranks = torch.where(ranks < low, ranks, ranks + (high - low)).to(sorted_k.device)  # none of the block's own
        stand_for = math.log(outside / len(ranks)) if len(ranks) else 0.0
        bias = torch.cat([torch.zeros(high - low), torch.full((len(ranks),), stand_for)])
        yield rectangle.queries(block, blocks), torch.cat([sorted_k[low:high], sorted_k[ranks]]), bias
