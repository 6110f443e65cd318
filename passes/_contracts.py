"""Contracts that passes of several families share, and the places in the graph that they vouch for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ..ir.ops import HEAD, QUANTIZED, arguments, is_op
from ..ir.program import Program
from .base import decoder_only


def cached_decoder(program: Program) -> Iterator[str]:
    """The contract of passes that act on the decode step: a decoder whose attention goes through a cache plan."""
    yield from decoder_only(program)
    if program.cache is None:
        yield f"{program.name} must have a cache plan, but has none: put cache.insert in front"


def one_head(program: Program) -> Iterator[str]:
    """The contract of passes that act on the way to the vocabulary: there is one."""
    found = [node.name for node in program.calls(HEAD)]
    if len(found) != 1:
        yield f"{program.name} must have one vocabulary head, but has {len(found)}: {', '.join(found) or 'none'}"


def before_head(program: Program) -> fx.Node:
    """What the one vocabulary head reads, before it is rounded where the head computes with integers."""
    (head,) = program.calls(HEAD)
    node: fx.Node = arguments(head)["x"]
    while is_op(node, QUANTIZED):
        node = arguments(node)["x"]
    return node


def within_context(program: Program, budget: int | None) -> Iterator[str]:
    """The contract of passes with a budget of tokens: one that the model's context can exceed."""
    context = program.facts.get("context")
    if budget is not None and context is not None and budget >= context:
        yield f"a budget of {budget} tokens is never exceeded in this model's context of {context}: lower it"
