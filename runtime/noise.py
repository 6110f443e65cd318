"""Gumbel noise that is a pure function of seed, request, position and token id: a draw never depends on batching.

A counter-based generator without state: the same key gives the same value whether a position is evaluated alone, in a
batch, or as a node of a draft tree. Sampled speculative output therefore equals sampled plain output token for token.

    key(seed, request, position) = mix(mix(mix(seed) + G·(request + 1)) + G·(position + 1))
    bits(key, id)                = mix(key + G·(id + 1))          # the SplitMix64 stream that starts at `key`
    u = (top 52 bits + 1/2) / 2^52,   gumbel = -log(-log(u))      # u in (0, 1), both logarithms in float64

All integers wrap modulo 2^64; `mix` is the 64-bit finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). A kernel
that wants the same noise on the fly needs only this formula.
"""

import torch

# G, the odd number nearest to 2^64 / golden ratio, and the two multipliers of the finaliser, as signed 64-bit integers
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 52  # with the added half, every value is exact in float64 and strictly inside (0, 1)


def gumbel(
    seed: int, request: int | torch.Tensor, positions: torch.Tensor, vocabulary: int | torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise, float32 [N, V] on the device of `positions`; finite, between -3.7 and 36.8.

    request: one id, or int64 [N] where rows belong to different requests. positions: absolute positions, int64 [N].
    vocabulary: V, for the ids 0..V-1 in every row, or int64 [N, V], the ids that each row wants.
    """
    keys = _keys(seed, request, positions)
    if isinstance(vocabulary, torch.Tensor) or keys.device.type != "cpu":
        return _gumbel(keys, vocabulary)
    # The nodes of a tree share positions, so few rows are distinct. In small blocks their temporaries stay in the cache
    # (16 rows of 152,000 ids: about half the time of evaluating them at once).
    distinct, row = keys.unique(return_inverse=True)
    blocks = distinct.split(max(1, 2**15 // vocabulary))
    return torch.cat([_gumbel(block, vocabulary) for block in blocks])[row]


def uniform(
    seed: int, request: int | torch.Tensor, positions: torch.Tensor, vocabulary: int | torch.Tensor
) -> torch.Tensor:
    """The uniforms in (0, 1) under the noise of `gumbel` with the same arguments, float64 [N, V]."""
    return _uniform(_keys(seed, request, positions), vocabulary)


def _keys(seed: int, request: int | torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One 64-bit key a row, int64 [N]."""
    positions = positions.to(torch.int64)
    of_request = torch.as_tensor(request, dtype=torch.int64, device=positions.device)
    start = _mix(torch.full_like(positions, _signed(seed)))
    return _mix(_mix(start + (of_request + 1) * _STEP) + (positions + 1) * _STEP)


def _gumbel(keys: torch.Tensor, vocabulary: int | torch.Tensor) -> torch.Tensor:
    # float64: the largest noise decides the draw, and near u = 1 float32 has only 2^-24 left to tell values apart
    return _uniform(keys, vocabulary).log_().neg_().log_().neg_().to(torch.float32)


def _uniform(keys: torch.Tensor, vocabulary: int | torch.Tensor) -> torch.Tensor:
    ids = vocabulary if isinstance(vocabulary, torch.Tensor) else torch.arange(vocabulary, device=keys.device)
    bits = _mix(keys[:, None] + (ids + 1) * _STEP)
    return _shifted(bits, 64 - _BITS).to(torch.float64).add_(0.5).mul_(2.0**-_BITS)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; overwrites x."""
    x ^= _shifted(x, 30)
    x *= _FIRST
    x ^= _shifted(x, 27)
    x *= _SECOND
    x ^= _shifted(x, 31)
    return x


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """x >> by with zeros coming in: torch shifts int64 arithmetically."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits, so that any Python integer may be a seed."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word
