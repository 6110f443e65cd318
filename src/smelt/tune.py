"""Fits speculation to a machine: how many tokens a step should draft is measured, greedy and sampled apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .ir.decode import DecodePlan
from .ir.errors import SmeltError
from .model import Compiled
from .request import Prompt

SIZES = (0, 1, 2, 3, 5, 7, 11, 15, 23, 31, 47, 63)
NEW = 48  # tokens of a request
ROUNDS = 3  # every size is tried so often, in turns, so that a slow moment hits all
KINDS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 1}}


@dataclass(frozen=True)
class Tuning:
    """Median tokens a second and tokens a step by drafted tokens (0: no speculation), and the best number of them."""

    rates: dict[int, float]
    per_step: dict[int, float]

    @property
    def best(self) -> int:
        """The size with the most tokens a second; the smallest of equal ones."""
        return max(self.rates, key=lambda size: (self.rates[size], -size))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "best": self.best,
            "tokens_per_second": {str(size): rate for size, rate in self.rates.items()},
            "tokens_per_step": {str(size): count for size, count in self.per_step.items()},
        }


def tune(
    compiled: Compiled, prompts: Sequence[Prompt], done: Callable[[int, int], None] = lambda now, total: None
) -> dict[str, Tuning]:
    """Measure every size that the recipe's drafter allows, and hold the model to the best from now on.

    What is generated stays the same: only the number of steps changes. `save` keeps what was found.
    Raises SmeltError for a model that does not draft.
    """
    plan = compiled.program.decode
    if plan is None:
        raise SmeltError(f"{compiled.program.name} does not draft: add a step such as decode.lookup to its recipe")
    if not prompts:
        raise SmeltError("tune: give at least one prompt")
    free = replace(plan, limits=None)
    sizes = [size for size in SIZES if size < plan.draft.most and (plan.draft.cuts or not size)] + [plan.draft.most]
    found = {}
    for kind, (name, options) in enumerate(KINDS.items()):
        taken: dict[int, list[tuple[float, int, int]]] = {size: [] for size in sizes}
        for number, size in enumerate(_turns(sizes)):
            done(kind * (ROUNDS + 1) * len(sizes) + number, len(KINDS) * (ROUNDS + 1) * len(sizes))
            compiled.program.decode = replace(free, limits=(size, size))
            for prompt in prompts:
                made = compiled.complete([prompt], max_new_tokens=NEW, eos=(), speculate="always", **options)
                if number >= len(sizes):  # the first turn builds and binds
                    taken[size].append((made.tokens_per_second, made.step_tokens, made.steps))
        rates = {size: statistics.median(rate for rate, _, _ in each) for size, each in taken.items()}
        steps = {size: sum(t for _, t, _ in each) / sum(s for _, _, s in each) for size, each in taken.items()}
        found[name] = Tuning(rates, steps)
    _hold(compiled, free, found)
    return found


def _turns(sizes: Sequence[int]) -> Iterator[int]:
    for turn in range(ROUNDS + 1):
        yield from sizes if turn % 2 else reversed(sizes)


def _hold(compiled: Compiled, plan: DecodePlan, found: dict[str, Tuning]) -> None:
    compiled.program.decode = replace(plan, limits=(found["greedy"].best, found["sampled"].best))
    compiled.facts["tuned"] = {name: tuning.to_dict() for name, tuning in found.items()}
