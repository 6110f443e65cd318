"""In which pieces prompts are read where the question behind a context chooses what of it is kept (Finch, 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .plan import CachePlan


class Reading(NamedTuple):
    """What each row reads next, and how many of these tokens `Cache.end_chunk` takes back: the question, or none."""

    texts: list[Sequence[int]]
    questions: list[int]


def readings(plan: CachePlan, prompts: Sequence[Sequence[int]]) -> Iterator[Reading]:
    """Every chunk of each prompt with its question behind it, where the plan says so; else the prompts as a whole.

    A row's last chunk keeps its question. Rows whose prompt is at its end read nothing while others go on.
    """
    if plan.chunk is None:
        yield Reading(list(prompts), [0] * len(prompts))
        return
    size, question = plan.chunk
    for start in range(0, max(1, max(map(len, prompts)) - question), size):
        reading = Reading([], [])
        for prompt in prompts:
            context = max(0, len(prompt) - question)
            ends = start + size >= context  # an empty context is one chunk too
            text = prompt[start:] if ends else [*prompt[start : start + size], *prompt[context:]]
            reading.texts.append(text if start < max(1, context) else [])
            reading.questions.append(0 if ends else question)
        yield reading
