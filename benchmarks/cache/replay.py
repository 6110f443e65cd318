"""What a recipe's cache costs and keeps on text: replayed through a session's real cache, weighed, and timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smelt.codegen.plan import Plan
from smelt.model import Compiled
from smelt.passes.measure import compare, perplexity
from smelt.runtime.session import Session

CHUNKS = (64, 32, 16, 8, 4, 2, 1)  # tokens of a step: powers of two, so that few bindings are made


@dataclass(frozen=True)
class Windows:
    """Texts of one length: tokens int64 [N, T], of which the first `prefix` are the prompt."""

    tokens: torch.Tensor
    prefix: int

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that are predicted, [N, T - prefix]."""
        return self.tokens[:, self.prefix :]


def windows(tokens: Sequence[int], length: int, count: int) -> Windows:
    """Up to `count` windows spread over the text; half of each is the prompt. A short text begins again."""
    whole = list(tokens) * math.ceil(length / len(tokens))
    count = max(1, min(count, len(whole) // length))
    stride = (len(whole) - length) // max(1, count - 1)
    return Windows(torch.tensor([whole[i * stride : i * stride + length] for i in range(count)]), length // 2)


@torch.no_grad()
def replay(plan: Plan, text: Windows, rows: int, chunk: int = 64) -> torch.Tensor:
    """Logits float32 [N, T - prefix, V] behind the prompt, whatever the model would have chosen.

    Steps bring at most `chunk` tokens and never more than the cache takes before a page leaves, so that `chunk` decides
    the time and not the result. Rows are read `rows` at a time.
    """
    parts = []
    for tokens in text.tokens.split(rows):
        count, length = tokens.shape
        session = Session(plan, count, length)
        logits = [session.prefill(tokens[:, : text.prefix].tolist())["logits"].float().clone()[:, None]]
        at = text.prefix
        while at < length - 1:
            new = step_size(session, min(chunk, length - 1 - at))
            outputs = session.step(tokens[:, at : at + new].contiguous(), _positions(count, at, new))
            logits.append(outputs["logits"].float().clone())
            session.cache.commit([list(range(new))] * count)
            at += new
        parts.append(torch.cat(logits, 1))
    return torch.cat(parts)


def step_size(session: Session, most: int) -> int:
    """Tokens of the next step: as many as the cache takes in all rows without letting a page go between them."""
    room = min(most, *session.cache.room())
    return next(size for size in CHUNKS if size <= room)


def _positions(rows: int, at: int, new: int) -> torch.Tensor:
    return torch.arange(at, at + new).repeat(rows, 1)


@dataclass(frozen=True)
class Fidelity:
    """Perplexity of a replay, and how far its logits are from those of the dense cache."""

    perplexity: float
    ratio: float
    kl: float
    top1: float


def fidelity(dense: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Fidelity:
    """Of logits [N, T, V] that should predict targets [N, T]."""
    found, wanted = perplexity(logits, targets), perplexity(dense, targets)
    apart = compare(dense, logits)
    return Fidelity(found, found / wanted, apart.kl, apart.top1)


@dataclass(frozen=True)
class Weight:
    """Bits of a cached key or value at a context: by the plan's formula and as measured, and the bytes they are of."""

    formula: float
    measured: float
    used: int
    allocated: int


@torch.no_grad()
def weigh(compiled: Compiled, tokens: Sequence[int]) -> Weight:
    """Of a cache that holds these tokens as a prompt: scales, indices and tables count, evicted tokens do too."""
    plan = compiled.program.cache
    assert plan is not None
    session = Session(compiled.plan, 1, len(tokens))
    session.prefill([list(tokens)])
    held = session.cache.nbytes()
    values = len(tokens) * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in plan.sites)
    return Weight(float(plan.bits_per_value(len(tokens))), 8 * held.used / values, held.used, held.allocated)


@torch.no_grad()
def decode_rate(compiled: Compiled, prompt: Sequence[int], new: int, rounds: int = 3) -> float:
    """Median tokens a second of plain greedy decoding behind a prompt."""
    asked = {"max_new_tokens": new, "eos": (), "speculate": False}
    compiled.complete([list(prompt)], **{**asked, "max_new_tokens": 2})
    return statistics.median(compiled.complete([list(prompt)], **asked).tokens_per_second for _ in range(rounds))
