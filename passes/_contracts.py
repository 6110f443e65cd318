"""Contracts that passes of several families share."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.program import Program
from .base import decoder_only


def cached_decoder(program: Program) -> Iterator[str]:
    """The contract of passes that act on the decode step: a decoder whose attention goes through a cache plan."""
    yield from decoder_only(program)
    if program.cache is None:
        yield f"{program.name} must have a cache plan, but has none: put cache.insert in front"


def within_context(program: Program, budget: int | None) -> Iterator[str]:
    """The contract of passes with a budget of tokens: one that the model's context can exceed."""
    context = program.facts.get("context")
    if budget is not None and context is not None and budget >= context:
        yield f"a budget of {budget} tokens is never exceeded in this model's context of {context}: lower it"
