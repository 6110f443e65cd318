"""How far residual blocks turn the stream: the cosine of what goes in and what comes out, on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from ..ir.blocks import Block
from ..ir.interpret import interpret
from ..ir.program import Program
from ._walk import given
from .base import Samples

TOKENS = 4096  # of the samples that are looked at

Span = tuple[Block, Block]  # the first and the last block of what is looked at


@torch.no_grad()
def cosines(program: Program, spans: Sequence[Span], samples: Samples) -> list[float]:
    """For each span the cosine of the streams in front of and behind it, the mean over tokens."""
    totals = [0.0] * len(spans)
    rows = samples.tokens[: max(1, TOKENS // samples.tokens.shape[1])]
    streams: dict[fx.Node, torch.Tensor] = {}

    def watch(node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        for at, (first, last) in enumerate(spans):
            if node is first.add:
                streams[node] = args[first.stream]
            if node is last.add:
                totals[at] += float(functional.cosine_similarity(streams[first.add], value, -1).mean())

    for number, row in enumerate(rows):
        samples.progress(number, len(rows), "measuring cosines")
        interpret(program, given(program, {"tokens": row[None]}), watch=watch)
    return [total / len(rows) for total in totals]
