"""Runs an exported decoder of style standard beside the interpreter and its cache, on tokens given beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smelt.codegen.onnx import export
from smelt.ir.cache import Cache
from smelt.ir.capture import capture
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.runtime.onnx_loop import Loop, loop

from ..families import zoo
from ..ir.programs import cached


@cache
def _captured(family: str) -> Program:
    return capture(zoo.model(family))


def decoder(family: str, **site: Any) -> Program:
    """A tiny decoder over a cache of such sites."""
    program = _captured(family).fork()
    derive(program)
    return cached(program, **site)


@dataclass
class Run:
    """Errors of every step, relative to the row's largest logit, and what both stored in the end."""

    errors: list[float] = field(default_factory=list)
    cache: Cache | None = None
    loop: Loop | None = None

    @property
    def worst(self) -> float:
        return max(self.errors)


def beside(
    program: Program, other: Program, folder: Path, lengths: tuple[int, ...] = (1, 45, 20), steps: int = 12
) -> Run:
    """Exports `program` and runs it beside the interpreter on `other`, which a right export is itself."""
    export(program, folder)
    random = torch.Generator().manual_seed(3)
    rows, capacity = len(lengths), max(lengths) + steps
    words = program.facts["vocabulary"]
    prompts = [torch.randint(0, words, (n,), generator=random) for n in lengths]
    later = torch.randint(0, words, (rows, steps), generator=random)
    store = Cache(other.cache, rows, capacity)  # type: ignore[arg-type]  # has one
    run = Run(cache=store, loop=loop(folder, rows, capacity))
    tokens, real = torch.zeros(rows, max(lengths), dtype=torch.int64), torch.zeros(rows, max(lengths), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], real[row, : len(prompt)] = prompt, True
    expected = _step(other, store, tokens, torch.arange(max(lengths)) * real, real)
    store.end_prefill()
    found = run.loop.prefill([prompt.tolist() for prompt in prompts])  # type: ignore[union-attr]
    run.errors.append(_error(expected, found["logits"]))
    for step in range(steps):
        token = later[:, step : step + 1]
        at = torch.tensor(store.lengths)[:, None]
        expected = _step(other, store, token, at, torch.ones_like(token, dtype=torch.bool))
        run.errors.append(_error(expected, run.loop.step(token[:, 0].tolist())["logits"]))  # type: ignore[union-attr]
    return run


def _step(program: Program, store: Cache, tokens: torch.Tensor, at: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    store.begin(at, real)
    logits = interpret(program, {"tokens": tokens, "positions": at}, store)["logits"]
    store.commit([list(range(int(count))) for count in real.sum(1)])
    return logits[torch.arange(len(tokens)), real.sum(1) - 1]


def _error(ours: torch.Tensor, theirs: Any) -> float:
    return float((np.abs(ours.detach().numpy() - theirs).max(-1) / ours.detach().abs().amax(-1).numpy()).max())
