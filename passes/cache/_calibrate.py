"""What a model writes into its cache on sample text, and how much an error there would cost: data for encodings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ...ir.cache import CachePlan, Site
from ...ir.errors import SmeltError
from ...ir.interpret import interpret
from ...ir.ops.attention import attention
from ...ir.program import Program
from ..base import Samples

TOKENS = 1 << 15  # of the samples at most: 16 windows of 2048, as KVQuant and CQ calibrate


@dataclass(frozen=True)
class Written:
    """Keys or values [G, N, D] of one layer in the frame in which they are stored, and their Fisher information."""

    x: torch.Tensor
    weight: torch.Tensor

    def paged(self, page: int) -> Written:
        """Without the last tokens, which fill no page: encodings may join the tokens of one."""
        whole = self.x.shape[1] // page * page
        if not whole:
            raise SmeltError(
                f"the samples leave {self.x.shape[1]} tokens behind the sinks, fewer than a page of {page}: give more"
            )
        return Written(self.x[:, :whole], self.weight[:, :whole])


@dataclass
class _Recorder:
    """Attends as a plain model does, and notes every key and value; what `slack` adds to them gets a gradient."""

    plan: CachePlan
    first: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    slack: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    now: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        site = self.plan[layer]
        positions = torch.arange(k.shape[2])
        plain = site.unrotates.turn(k, -positions) if site.unrotates else k
        noted = []
        for role, x in (("keys", plain), ("values", v)):
            self.first[layer, role] = x.detach()
            self.slack[layer, role] = torch.zeros_like(x, requires_grad=True)
            noted.append(x + self.slack[layer, role])
        self.now = (site.unrotates.turn(noted[0], positions) if site.unrotates else noted[0]), noted[1]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self.now is not None
        return attention(q, *self.now, None, sinks, scale, True, window, softcap)


def written(program: Program, samples: Samples) -> dict[tuple[int, str], Written]:
    """By (layer, role), what the samples write behind the sinks, and the diagonal Fisher information of the loss.

    The information of a number is the square of its gradient, of the summed cross-entropy of the next tokens (KVQuant,
    2024, section 3.3; CQ, 2024, section 3.2).
    """
    assert program.cache is not None
    found: dict[tuple[int, str], list[Written]] = {}
    windows = list(_windows(samples.tokens))
    for number, tokens in enumerate(windows):
        samples.progress(number, len(windows), "recording the cache")
        recorder = _Recorder(program.cache)
        with torch.enable_grad():
            positions = torch.arange(tokens.shape[1])[None]
            logits = interpret(program, {"tokens": tokens, "positions": positions}, recorder)["logits"]
            functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum").backward()
        for key, x in recorder.first.items():
            skip = program.cache[key[0]].sink
            grad = recorder.slack[key].grad
            assert grad is not None
            found.setdefault(key, []).append(Written(x[0, :, skip:], grad[0, :, skip:].square()))
    return {key: Written(*(torch.cat([getattr(w, name) for w in ws], 1) for name in ("x", "weight")))
            for key, ws in found.items()}  # fmt: skip


def _windows(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows [1, T] of the samples, up to the most tokens that are looked at."""
    seen = 0
    for row in tokens:
        if seen >= TOKENS:
            return
        seen += len(row)
        yield row[None]


def tables(sites: list[Site], noted: dict[tuple[int, str], Written], number: int = 0) -> dict[str, torch.Tensor]:
    """The tables of body `number` of these sites, by `layer.role.part`."""
    out: dict[str, torch.Tensor] = {}
    for site in sites:
        for role, encoding in zip(("keys", "values"), site.encodings[number], strict=True):
            if not encoding.calibrated:
                continue
            lead = f"{site.layer}.{role}" if not number else f"{site.layer}.{role}.{number}"
            data = noted[site.layer, role].paged(site.caps[number])
            out |= {f"{lead}.{part}": table for part, table in encoding.fit(data.x, data.weight).items()}
    return out
