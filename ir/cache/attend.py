"""Attention of one row over decoded segments: the obviously right form that every kernel is compared with."""

from __future__ import annotations

import torch

from .segments import Read
from .step import Step

LOGITS = 1 << 24  # most logits held at once (64 MiB in float32); longer prompts go through in blocks of queries


def attend_row(
    q: torch.Tensor,
    step: Step,
    row: int,
    reads: list[Read],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v in float32 over a row's stored tokens and the new ones seen; q [H, T, D] → [H, T, E].

    The step's T new tokens are the last of `reads`. Queries that are not valid yield zeros. `window`: only tokens at a
    distance below it are seen. `softcap` c: logits become c · tanh(logits / c). `sinks` [H]: a logit per head that
    carries no value.
    """
    heads, new, _ = q.shape
    keys = torch.cat([read.keys for read in reads], 1)
    values = torch.cat([read.values for read in reads], 1)
    groups, stored = keys.shape[0], keys.shape[1] - new
    positions = torch.cat([read.positions.expand(groups, -1) for read in reads], 1)
    bias = torch.cat([_bias(read) for read in reads], 1) if any(read.bias is not None for read in reads) else None
    at, real = step.positions[row], step.valid[row]
    values[:, stored:] = torch.where(real[:, None], values[:, stored:], 0.0)  # padding may hold anything
    out = q.new_zeros(heads, new, values.shape[-1])
    block = max(1, LOGITS // (heads * keys.shape[1]))
    for first in range(0, new, block):
        rows = slice(first, first + block)
        grouped = q[:, rows].float().unflatten(0, (groups, heads // groups))
        logits = grouped @ keys[:, None].mT * scale  # [G, H / G, block, S]
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        fresh = step.sees(row, rows)
        seen = torch.cat([fresh.new_ones(len(fresh), stored), fresh], 1).expand(groups, -1, -1)
        if window is not None:
            seen = seen & (at[rows, None] - positions[:, None, :] < window)
        if any(read.seen is not None for read in reads):
            picked = [_picked(read, rows, groups) for read in reads]
            seen = seen & torch.cat([p.expand(-1, seen.shape[1], -1) for p in picked], -1)
        if bias is not None:
            logits = logits + bias[:, None, None]
        logits = logits.masked_fill(~seen[:, None], float("-inf"))
        if sinks is not None:
            extra = sinks.float().view(groups, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, extra], -1)
        shares = torch.softmax(logits, -1)[..., : keys.shape[1]]
        mixed = (shares @ values[:, None]).flatten(0, 1)
        out[:, rows] = torch.where(real[rows, None], mixed, 0.0).to(out.dtype)
    return out


def _bias(read: Read) -> torch.Tensor:
    """What is added to the logits of a read's tokens, [G, n]."""
    return read.keys.new_zeros(read.keys.shape[:2]) if read.bias is None else read.bias


def _picked(read: Read, rows: slice, groups: int) -> torch.Tensor:
    """Which of a read's tokens these queries read, bool [G, queries or 1, n]."""
    if read.seen is not None:
        return read.seen[:, rows]
    return torch.ones(groups, 1, read.keys.shape[1], dtype=torch.bool, device=read.keys.device)
