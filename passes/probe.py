"""What Programs are compared on: a few tokens, the same every time, from held-out samples where there are any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.cache import CachePlan
from ..ir.errors import SmeltError
from ..ir.ops import EMBEDDING, arguments
from ..ir.program import Program
from .base import Samples

PREFIX = 96  # tokens of the prompt; a cache that holds back more asks for a longer one
LONGEST = 2048  # a prompt is not made longer than this, however late a cache compresses
LENGTH = 16  # T of what is no decoder
ROWS = 64  # of samples of what is no decoder
SMALL, LARGE = 30e6, 300e6  # logical weight values; each decode step decodes every weight once


@dataclass(frozen=True)
class Probe:
    """Inputs by name. For a decoder `prefix` tokens are the prompt and the rest arrive `chunk` at a time.

    `real` bool [B, T] marks the places of an encoder's outputs that are not padding.
    """

    inputs: Mapping[str, torch.Tensor]
    prefix: int | None = None
    chunk: int = 1
    real: torch.Tensor | None = None


def held_out(samples: Samples) -> tuple[Samples, Samples]:
    """Samples without their last eighth (at least one row), and that eighth; a single row is used on both sides."""
    kept = len(samples) - max(1, len(samples) // 8)
    if not kept:
        return samples, samples
    return samples.rows(slice(kept)), samples.rows(slice(kept, None))


def probe(program: Program, unseen: Mapping[str, torch.Tensor] | None = None, reach: int = 0) -> Probe:
    """The probe for a Program and its rewrites; random without samples of its inputs, [N, …] each, to take it from.

    `reach`: tokens that the prompt must have, if the model's context allows, for the cache to store something encoded.
    """
    unseen = unseen or {}
    tokens = unseen.get("tokens")
    if program.facts.get("kind") != "decoder":
        return _plain(program, unseen)
    size = sum(math.prod(weight.shape) for weight in program.weights.values())
    batch, new, chunk = (2, 32, 4) if size <= SMALL else (1, 16, 4) if size <= LARGE else (1, 16, 16)
    total = max(PREFIX, min(reach, LONGEST)) + new
    total = min(total, program.facts.get("context") or total)
    new = min(new, max(1, total // 4))
    return Probe({"tokens": _tokens(program, tokens, batch, total)}, prefix=total - new, chunk=chunk)


def reach(plan: CachePlan | None) -> int:
    """Tokens after which every site of a plan has let a page leave its tail; 0 if none ever does."""
    waits = (site.sink + site.tail + site.page for site in plan.sites if site.tail is not None) if plan else ()
    return max(waits, default=0)


def _plain(program: Program, unseen: Mapping[str, torch.Tensor]) -> Probe:
    """Some samples for what is no decoder, or random inputs; an encoder's second row is half padding."""
    if set(program.inputs) <= set(unseen):
        return Probe({name: unseen[name][-ROWS:] for name in program.inputs})
    described = program.facts.get("inputs")
    if described is None:
        length = min(LENGTH, program.facts.get("context") or LENGTH)
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        found = {"tokens": _tokens(program, unseen.get("tokens"), 2, length), "mask": mask}
        if unknown := sorted(set(program.inputs) - set(found)):
            raise SmeltError(f"program {program.name}: facts['inputs'] must describe the inputs {unknown} to probe it")
        return Probe(found, real=mask.bool() if "mask" in program.inputs else None)
    random = torch.Generator().manual_seed(0)
    return Probe({name: _random(program, name, described[name], random) for name in program.inputs})


def _random(program: Program, name: str, told: Mapping[str, Any], random: torch.Generator) -> torch.Tensor:
    shape = [(2 if d == "B" else LENGTH) if isinstance(d, str) else int(d) for d in told["shape"]]
    dtype = getattr(torch, told["dtype"])
    if dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(dtype)
    return torch.randint(0, min(_tables(program, name), default=2), shape, generator=random).to(dtype)


def _tables(program: Program, name: str) -> Iterator[int]:
    """Rows of the embedding tables that an input indexes."""
    for node in program.calls(EMBEDDING):
        called = arguments(node)
        if str(called["ids"].target) == name:
            yield program.weights[str(called["weight"].target)].shape[0]


def _tokens(program: Program, tokens: torch.Tensor | None, batch: int, length: int) -> torch.Tensor:
    """int64 [batch, length]: the end of `tokens`, repeated if they are too few, or random ids."""
    if tokens is None or not tokens.numel():
        random = torch.Generator().manual_seed(0)
        return torch.randint(0, program.facts["vocabulary"], (batch, length), generator=random)
    flat = tokens.reshape(-1)
    flat = flat.repeat(-(-batch * length // len(flat)))
    return flat[-batch * length :].reshape(batch, length).to(torch.int64)
