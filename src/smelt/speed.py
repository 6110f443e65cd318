"""Times generation. Contestants take turns within one run, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from .ir.errors import SmeltError
from .model import Compiled

WARM_UP = 4  # tokens of an untimed request, which builds and binds what is missing


@dataclass(frozen=True)
class Timing:
    """One request: the prompt and its first token took `prefill` seconds, `tokens` more in `steps` took `decode`."""

    prompt: int
    prefill: float
    decode: float
    tokens: int
    steps: int


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float


Runner: TypeAlias = Callable[[Sequence[int], int], Timing]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single value, that value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def compiled_runner(compiled: Compiled, speculate: bool = True) -> Runner:
    """Greedy requests to a compiled model."""

    def run(prompt: Sequence[int], new: int) -> Timing:
        done = compiled.complete([list(prompt)], max_new_tokens=new, eos=(), speculate=speculate)
        return Timing(len(prompt), done.prefill_seconds, done.decode_seconds, done.step_tokens, done.steps)

    return run


def transformers_model(model: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model in transformers' eager mode, that is without torch.compile, attention by torch's fused op."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as fault:
        raise SmeltError("comparing to transformers needs it: pip install 'smelt[hf]'") from fault
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
    except (OSError, ValueError) as fault:
        raise SmeltError(f"{model}: transformers does not load it ({str(fault).splitlines()[0]})") from fault


def transformers_runner(model: Any) -> Runner:
    """Greedy requests to a transformers model: its forward and its cache in a bare loop, faster than `generate`."""

    @torch.inference_mode()
    def run(prompt: Sequence[int], new: int) -> Timing:
        start = time.perf_counter()
        out = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        ready = time.perf_counter()
        for _ in range(new - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return Timing(len(prompt), ready - start, time.perf_counter() - ready, new - 1, new - 1)

    return run


def race(
    runners: Mapping[str, Runner],
    prompts: Sequence[Sequence[int]],
    new: int,
    rounds: int,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Timing]]:
    """Timings of each runner over `rounds` of all prompts; who goes first changes from request to request."""
    for run in runners.values():
        run(prompts[0], min(new, WARM_UP))
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    requests = [prompt for _ in range(rounds) for prompt in prompts]
    for number, prompt in enumerate(requests):
        tell(number, len(requests))
        names = list(runners)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            timings[name].append(runners[name](prompt, new))
    return timings


def decode_rate(timings: Sequence[Timing]) -> Spread:
    """Tokens per second behind the prompt."""
    return spread([t.tokens / t.decode for t in timings])


def prefill_rate(timings: Sequence[Timing]) -> Spread:
    """Prompt tokens per second."""
    return spread([t.prompt / t.prefill for t in timings])


def per_step(timings: Sequence[Timing]) -> float:
    """Tokens for each run of the model."""
    return sum(t.tokens for t in timings) / max(1, sum(t.steps for t in timings))


def ratio(ours: Sequence[Timing], theirs: Sequence[Timing]) -> Spread:
    """How many times as fast ours decodes, request by request."""
    return spread([(a.tokens / a.decode) / (b.tokens / b.decode) for a, b in zip(ours, theirs, strict=True)])
