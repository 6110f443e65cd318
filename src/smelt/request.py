"""What a call of generate asks for: its options, checked, over those that the recipe presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import torch

from .ir.choice import ChoicePlan, Constrain
from .ir.errors import SmeltError, nearest
from .runtime.align import Alignment
from .runtime.constraint import NAMES as CONSTRAINTS
from .runtime.constraint import Kind
from .runtime.prefix import Prefix
from .runtime.sampling import Sampling
from .runtime.writer import Limits

Prompt: TypeAlias = str | Sequence[int] | torch.Tensor
Speculate: TypeAlias = Literal[True, False, "always"]
SAMPLING = tuple(field.name for field in fields(Sampling))
OPTIONS = ("max_new_tokens", "stop", "eos", "speculate", "prefix", "against", "constrain", *CONSTRAINTS, *SAMPLING)


@dataclass(frozen=True)
class Request:
    """One call's options."""

    sampling: Sampling
    limits: Limits
    stop: Sequence[str]
    speculate: Speculate
    prefix: Prefix | None
    against: Any
    """The other prompt, or one for each."""
    constraints: Mapping[Kind, Any]
    constrain: Constrain
    alignment: Alignment | None
    """The caller's own, if there is one."""


def request(options: Mapping[str, Any], facts: Mapping[str, Any], choice: ChoicePlan | None) -> Request:
    """The options of a call to a program of these facts. Raises SmeltError for what is unknown or out of range."""
    given = dict(options)
    if strange := sorted(given.keys() - set(OPTIONS)):
        raise SmeltError(
            f"generate: unknown option '{strange[0]}'{nearest(strange[0], OPTIONS)}; known: {', '.join(OPTIONS)}"
        )
    new_tokens, prefix = given.get("max_new_tokens", 64), given.get("prefix")
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise SmeltError(f"generate: max_new_tokens must be a whole number from 1, not {new_tokens!r}")
    if prefix is not None and not isinstance(prefix, Prefix):
        raise SmeltError(f"generate: prefix is what `read` or `load_prefix` gave, not a {type(prefix).__name__}")
    speculate = given.get("speculate", True)
    if speculate not in get_args(Speculate):
        raise SmeltError(f"generate: speculate is True (as long as it pays), False or 'always', not {speculate!r}")
    preset: dict[str, Any] = choice.preset.options if choice is not None else {}
    sampling = preset | {name: given[name] for name in SAMPLING if name in given}
    return Request(
        Sampling(**sampling),
        Limits(new_tokens, frozenset(given.get("eos", facts.get("eos") or ()))),
        given.get("stop", ()),
        speculate,
        prefix,
        given.get("against"),
        {kind: given.get(kind) for kind in CONSTRAINTS},
        *_holding(given, "mask" if choice is None else choice.constrain),
    )


def _holding(given: Mapping[str, Any], usual: Constrain) -> tuple[Constrain, Alignment | None]:
    """How an answer is held to its grammar, and by which alignment if the caller brings one."""
    asked = given.get("constrain")
    if asked is None:
        return usual, None
    if all(given.get(kind) is None for kind in CONSTRAINTS):
        raise SmeltError(f"generate: constrain is of a constraint: give one of {', '.join(CONSTRAINTS)} with it")
    if isinstance(asked, Alignment):
        return "align", asked
    if asked not in get_args(Constrain):
        raise SmeltError(f"generate: constrain is mask, align (or an Alignment) or reject, not {asked!r}")
    held: Constrain = asked
    return held, None


def as_batch(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether it was a single one."""
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, torch.Tensor):
        return (list(prompt), False) if prompt.dim() == 2 else ([prompt.reshape(-1)], True)
    items = list(prompt)
    if not items:
        raise SmeltError("generate: the prompt is empty; give text or at least one token id")
    return ([items], True) if isinstance(items[0], Integral) else (items, False)
