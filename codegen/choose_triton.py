"""The next token of each row of logits on a GPU, in Triton: argmax or Gumbel-max with the noise of `runtime/noise.py`.

`scan` finds the best token of each part of a row's vocabulary, `choose` the best of those. What a choice depends on (a
switch, seed, temperature, requests, positions) is read from device memory: a captured step can choose otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch

from .triton_module import load

BLOCK = 1024  # ids that a program looks at together
PROGRAMS = 512  # of `scan`, about four on each multiprocessor: few rows are made up for by parts of the vocabulary
OPTIONS = {"num_warps": 8}
_CHOICE, _HEAT = "step choice", "step temperature"  # no names of inputs
_ON, _SEED, _REQUESTS = 0, 1, 2  # words of a choice; the requests of all rows follow each other
_GOLDEN = "0x9E3779B97F4A7C15"


class TritonChooser:
    """Chooses behind one bound head, for as long as it is switched on."""

    def __init__(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        here: Mapping[str, torch.Tensor],
        there: Mapping[str, torch.Tensor],
        buffer: torch.Tensor,
    ) -> None:
        """`logits` float32 [B, T, V] of `positions` int64 [B, T], contiguous. `here`, `there`: the tensors of `likes`.

        What `start` writes `here` must be `there` before `calls` run. `buffer` int64 [B, T] lies on the host.
        """
        self._here, self._buffer = here, buffer
        rows, tokens, vocabulary = logits.shape
        many, span = splits(rows * tokens, vocabulary)
        made = partial(logits.new_empty, rows * tokens, many)
        scores, found = made(dtype=torch.float64), made(dtype=torch.int32)
        self._chosen = logits.new_zeros(rows, tokens, dtype=torch.int64)
        words, heat = there[_CHOICE], there[_HEAT]
        given = (logits, words, heat, positions, scores, found, tokens, vocabulary, span)
        grid = rows * tokens, many
        self.calls: tuple[Callable[[], Any], ...] = (
            partial(_launch, "scan", grid, *given, BLOCK=BLOCK, **OPTIONS),
            partial(_launch, "choose", grid[:1], words, scores, found, self._chosen, SPLITS=many, num_warps=1),
        )

    @property
    def chosen(self) -> torch.Tensor:
        """The last choices, int64 [B, T] on the host, -1 where a row had no finite score; waits for the device."""
        return self._buffer.copy_(self._chosen)

    def start(self, seed: int, temperature: float, requests: torch.Tensor, logits: bool) -> None:
        """Choose from now on, greedily at temperature 0; `requests` int64 [B] key the noise. Logits are there too."""
        words = self._here[_CHOICE]
        words[_ON], words[_SEED] = 1, seed - (seed >> 63 << 64)
        words[_REQUESTS:].copy_(requests)
        self._here[_HEAT].fill_(temperature)

    def stop(self) -> None:
        """Only compute logits again."""
        self._here[_CHOICE][_ON] = 0


def likes(rows: int) -> dict[str, torch.Tensor]:
    """What a chooser for so many rows reads besides logits and positions, by name: shapes and types, switched off."""
    return {_CHOICE: torch.zeros(_REQUESTS + rows, dtype=torch.int64), _HEAT: torch.zeros(1)}


def splits(rows: int, vocabulary: int) -> tuple[int, int]:
    """Into how many parts the ids of a row are cut, a power of two, and how many ids each has."""
    many = max(1, min(_power(-(-PROGRAMS // rows)), _power(-(-vocabulary // BLOCK))))
    return many, -(-vocabulary // (many * BLOCK)) * BLOCK


def signatures() -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels, for compiling ahead of time."""
    parts = {"scores": "*fp64", "tokens": "*i32"}
    where = {"logits": "*fp32", "words": "*i64", "temperature": "*fp32", "positions": "*i64"}
    return {
        "scan": {**where, **parts, **dict.fromkeys(("T", "V", "span"), "i32"), "BLOCK": "constexpr"},
        "choose": {"words": "*i64", **parts, "chosen": "*i64", "SPLITS": "constexpr"},
    }


@cache
def module() -> Any:
    """The kernels `scan` and `choose`."""
    return load(KERNELS, "choose")


def _launch(kernel: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    getattr(module(), kernel)[grid](*args, **options)


def _power(n: int) -> int:
    """The lowest power of two from n on."""
    return 1 << max(0, n - 1).bit_length()


KERNELS = f'''\
"""Of every row of logits the best token, with noise or without"""

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """SplitMix64's finaliser, of uint64. Word n of a stream is that of its start + (n + 1) times the golden ratio."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noisy(x, bits, best):
    """x with Gumbel noise in float64; -inf for all if none can reach `best`.

    Noise lifts x by d only if 1 - u <= e^-d, since u >= e^-e^-d >= 1 - e^-d: most blocks need no logarithm. 1 - u is
    cut to 24 bits, and e^-d made larger than it may be rounded.
    """
    score = tl.full(x.shape, float("-inf"), tl.float64)
    near = tl.clamp(best.to(tl.float32), -3e38, 3e38)  # infinities less each other are no bound
    above = tl.minimum(x - near + 1e-6 * tl.abs(near), 0.0)  # NaN may win
    left = {2.0**24 - 1} - (bits >> 40).to(tl.float32)
    beaten = left > tl.exp(above) * {1.001 * 2**24} + 1.0
    if tl.min(beaten.to(tl.int32), 0) == 0:
        u = ((bits >> 12).to(tl.float64) + 0.5) * {2.0**-52!r}
        score = x.to(tl.float64) - tl.log(-tl.log(u))
    return score


@triton.jit
def first_best(score, token):
    """The greatest score, and the lowest of the tokens that have it."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, token, 0x7FFFFFFF), 0)


@triton.jit
def scan(logits, words, temperature, positions, scores, tokens, T, V, span, BLOCK: tl.constexpr):
    if tl.load(words + {_ON}) == 0:
        return
    m, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(temperature)
    request, position = tl.load(words + {_REQUESTS} + m // T), tl.load(positions + m) + 1  # that of the token to come
    start = mixed(tl.load(words + {_SEED}).to(tl.uint64))
    key = mixed(mixed(start + (request + 1).to(tl.uint64) * {_GOLDEN}) + (position + 1).to(tl.uint64) * {_GOLDEN})
    best, found = tl.full((), float("-inf"), tl.float64), tl.full((), 0x7FFFFFFF, tl.int32)
    for first in range(split * span, tl.minimum((split + 1) * span, V), BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = tl.load(logits + m * V + token, mask=token < V, other=float("-inf"))
        score = x.to(tl.float64)
        if heat > 0:
            bits = mixed(key + (token + 1).to(tl.uint64) * {_GOLDEN})
            score = noisy(tl.div_rn(x, heat + tl.zeros_like(x)), bits, best)
        score = tl.where(score != score, float("inf"), score)  # NaN is ahead of all numbers, and no number either
        most, lowest = first_best(score, token)
        if most > best:
            best, found = most, lowest
    at = m * tl.num_programs(1) + split
    tl.store(scores + at, best)
    tl.store(tokens + at, found)


@triton.jit
def choose(words, scores, tokens, chosen, SPLITS: tl.constexpr):
    if tl.load(words + {_ON}) == 0:
        return
    m = tl.program_id(0).to(tl.int64)
    at = m * SPLITS + tl.arange(0, SPLITS)
    best, token = first_best(tl.load(scores + at), tl.load(tokens + at))
    tl.store(chosen + m, tl.where(tl.abs(best) < float("inf"), token, -1))
'''
