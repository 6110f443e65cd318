"""What a compiled decoder costs and what it keeps: bytes, divergence and tokens, measured through its own kernels."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch

from .codegen.plan import Plan
from .completion import Generation
from .ir.decode import Walk
from .ir.errors import SmeltError, nearest
from .model import Compiled
from .passes.measure import Divergence, compare, perplexity
from .request import Speculate
from .runtime.session import Session
from .texts import Text

CONTEXT = 1024  # tokens at which a cache is weighed; fewer where the model's context ends before
ROWS = 8  # windows of text that are replayed at once
NEW = 64  # tokens that a request makes
REQUESTS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 2})

METRICS = {
    "bits_per_weight": "stored bits of all weights, scales and indices included, per parameter of the source model",
    "parameters_ratio": "weight values, per parameter of the source model",
    "bits_per_value": "stored bits per cached key or value at 1024 tokens, by the plan's formula",
    "measured_bits_per_value": "the same, from the bytes that a cache of 1024 tokens holds",
    "disk_bytes": "bytes of the artefact's files",
    "memory_bytes": "bytes of the weights and of a cache of 1024 tokens",
    "perplexity": "of held-out text, replayed token by token through the cache",
    "perplexity_ratio": "perplexity over that of the source model",
    "replay_kl": "KL(source || compiled) of the replayed logits, nats",
    "top1": "share of replayed positions where the likeliest token is the source's",
    "far_perplexity_ratio": "perplexity_ratio, of 128 tokens behind a prompt of 384 (a quarter behind the rest)",
    "far_kl": "KL(source || compiled) of the same",
    "far_top1": "top1 of the same",
    "tokens_per_step": "tokens for each run of the model, greedy",
    "tokens_per_step_sampled": "tokens for each run of the model, at temperature 1",
    "tokens_per_second": "decoded tokens, greedy, one request at a time; median of the requests",
    "tokens_per_second_sampled": "decoded tokens at temperature 1, likewise",
    "lossless": "1 if requests give the same tokens with and without speculation (sampled ones: by the walk), else 0",
}
NEEDS_SOURCE = {"bits_per_weight", "parameters_ratio", "perplexity_ratio", "replay_kl", "top1"}
NEEDS_SOURCE |= {"far_perplexity_ratio", "far_kl", "far_top1"}


@torch.no_grad()
def replay(plan: Plan, tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits float32 [N, T - prefix, V] that predict tokens[:, prefix:], through a plan's kernels and its real cache.

    The first `prefix` tokens are a prompt, the others arrive one at a time, whatever the model would have chosen.
    """
    parts = []
    for rows in tokens.split(ROWS):
        count, length = rows.shape
        session = Session(plan, count, length)
        logits = [session.prefill(rows[:, :prefix].tolist())["logits"].float().clone()]
        for at in range(prefix, length - 1):
            positions = torch.full((count, 1), at)
            outputs = session.step(rows[:, at : at + 1].contiguous(), positions)
            logits.append(outputs["logits"][:, 0].float().clone())
            session.cache.commit([[0]] * count)
        parts.append(torch.stack(logits, 1))
    return torch.cat(parts)


class Source:
    """The model as it was, compiled by a recipe that changes nothing, and what it answers on a text."""

    def __init__(self, compiled: Compiled, text: Text) -> None:
        self.compiled, self.text = compiled, text

    @property
    def parameters(self) -> int:
        """Values of all weights."""
        return parameters(self.compiled)

    @cached_property
    def logits(self) -> torch.Tensor:
        """As `replay` gives them."""
        return replay(self.compiled.plan, self.text.windows, self.text.prefix)

    @cached_property
    def far(self) -> torch.Tensor:
        """The same of the long windows."""
        return replay(self.compiled.plan, self.text.far, self.text.far_prefix)


@dataclass(frozen=True)
class Equality:
    """How many requests gave the same tokens with and without speculation, and the first that did not."""

    equal: int
    total: int
    difference: str = ""


class Meter:
    """Measures a compiled decoder; every metric is taken when it is first asked for.

    Without a `source` the metrics that compare to one are refused. `folder`: its artefact, else one is written to a
    temporary place to be weighed. `done(metric)` is told before each measurement.
    """

    def __init__(
        self,
        compiled: Compiled,
        text: Text,
        source: Source | None = None,
        folder: Path | None = None,
        done: Callable[[str], None] = lambda metric: None,
    ) -> None:
        if compiled.program.cache is None:
            raise SmeltError(f"{compiled.program.name} has no cache: quality is measured of decoders that generate")
        self.compiled, self.text, self.source, self.folder, self._tell = compiled, text, source, folder, done
        self._values: dict[str, float] = {}

    def __getitem__(self, metric: str) -> float:
        """The value of a metric, NaN where it has no meaning for this program."""
        if metric not in METRICS:
            raise SmeltError(f"no metric '{metric}'{nearest(metric, METRICS)}; known: {', '.join(METRICS)}")
        if metric in NEEDS_SOURCE and self.source is None:
            raise SmeltError(
                f"{metric} compares to the source model, which is not at hand: name it with --source MODEL"
            )
        if metric not in self._values:
            self._tell(metric)
            self._values[metric] = float(getattr(self, f"_{metric}")())
        return self._values[metric]

    def all(self) -> dict[str, float]:
        """Every metric that can be measured here."""
        return {metric: self[metric] for metric in METRICS if self.source is not None or metric not in NEEDS_SOURCE}

    @cached_property
    def equality(self) -> Equality:
        """Requests with speculation against the same without; where there is none, against a second run.

        Sampled ones only where drafts are accepted by the walk: other exact rules keep the law, not the draws.
        """
        equal, total, difference = 0, 0, ""
        plan = self.compiled.program.decode
        walks = plan is None or isinstance(plan.accept, Walk)
        for number, (drafted, plain) in enumerate(zip(self._generated, self._generate(speculate=False), strict=True)):
            if not walks and REQUESTS[number % len(REQUESTS)]:
                continue
            total += 1
            pair = drafted.rows[0].tokens, plain.rows[0].tokens
            equal += pair[0] == pair[1]
            if pair[0] != pair[1] and not difference:
                at = next(i for i, (a, b) in enumerate(zip_longest(*pair)) if a != b)
                prompt, seed = divmod(number, len(REQUESTS))
                difference = f"prompt {prompt}, {REQUESTS[seed] or 'greedy'}: differs at token {at}"
        return Equality(equal, total, difference)

    @cached_property
    def divergence(self) -> Divergence:
        """Of the replayed logits from the source's."""
        assert self.source is not None
        return compare(self.source.logits, self._logits)

    def _generate(self, speculate: Speculate) -> list[Generation]:
        """Every prompt with each of REQUESTS, one at a time."""
        new = min(NEW, self.compiled.context - self.compiled.ahead - len(self.text.prompts[0]))
        fixed: dict[str, Any] = {"max_new_tokens": new, "eos": (), "speculate": speculate}
        asked = product(self.text.prompts, REQUESTS)
        return [
            self.compiled.complete([prompt], **fixed, **({"temperature": 0.0} | request)) for prompt, request in asked
        ]

    @cached_property
    def _generated(self) -> list[Generation]:
        self.compiled.complete(self.text.prompts[:1], max_new_tokens=2)  # builds what is not built yet
        return self._generate(speculate="always")

    def _taken(self, sampled: bool) -> list[Generation]:
        return [g for number, g in enumerate(self._generated) if bool(number % len(REQUESTS)) == sampled]

    @cached_property
    def _logits(self) -> torch.Tensor:
        return replay(self.compiled.plan, self.text.windows, self.text.prefix)

    @cached_property
    def _far(self) -> torch.Tensor:
        return replay(self.compiled.plan, self.text.far, self.text.far_prefix)

    @cached_property
    def _cache_bytes(self) -> tuple[int, int]:
        """Tokens, and the bytes that a cache of so many holds."""
        length = min(CONTEXT, self.compiled.context)
        flat = self.text.windows.flatten()
        session = Session(self.compiled.plan, 1, length)
        session.prefill([flat.repeat(-(-length // len(flat)))[:length].tolist()])
        return length, session.cache.nbytes().used

    def _bits_per_weight(self) -> float:
        assert self.source is not None
        return 8 * self.compiled.stored.nbytes / self.source.parameters

    def _parameters_ratio(self) -> float:
        assert self.source is not None
        return parameters(self.compiled) / self.source.parameters

    def _bits_per_value(self) -> float:
        plan = self.compiled.program.cache
        assert plan is not None
        return float(plan.bits_per_value(min(CONTEXT, self.compiled.context)))

    def _measured_bits_per_value(self) -> float:
        plan = self.compiled.program.cache
        assert plan is not None
        length, held = self._cache_bytes
        return 8 * held / (length * sum(s.kv_heads * (s.key_dim + s.value_dim) for s in plan.sites))

    def _disk_bytes(self) -> float:
        if self.folder is not None:
            return sum(path.stat().st_size for path in self.folder.iterdir())
        with tempfile.TemporaryDirectory(prefix="smelt-") as place:
            self.compiled.save(Path(place) / "artefact")
            return sum(path.stat().st_size for path in (Path(place) / "artefact").iterdir())

    def _memory_bytes(self) -> float:
        return self.compiled.program.nbytes + self._cache_bytes[1]

    def _perplexity(self) -> float:
        return perplexity(self._logits, self.text.windows[:, self.text.prefix :])

    def _perplexity_ratio(self) -> float:
        assert self.source is not None
        return self["perplexity"] / perplexity(self.source.logits, self.text.windows[:, self.text.prefix :])

    def _replay_kl(self) -> float:
        return self.divergence.kl

    def _top1(self) -> float:
        return self.divergence.top1

    def _far_perplexity_ratio(self) -> float:
        assert self.source is not None
        after = self.text.far[:, self.text.far_prefix :]
        return perplexity(self._far, after) / perplexity(self.source.far, after)

    def _far_kl(self) -> float:
        assert self.source is not None
        return compare(self.source.far, self._far).kl

    def _far_top1(self) -> float:
        assert self.source is not None
        return compare(self.source.far, self._far).top1

    def _tokens_per_step(self) -> float:
        return _per_step(self._taken(sampled=False))

    def _tokens_per_step_sampled(self) -> float:
        return _per_step(self._taken(sampled=True))

    def _tokens_per_second(self) -> float:
        return statistics.median(g.tokens_per_second for g in self._taken(sampled=False))

    def _tokens_per_second_sampled(self) -> float:
        return statistics.median(g.tokens_per_second for g in self._taken(sampled=True))

    def _lossless(self) -> float:
        return float(self.equality.equal == self.equality.total)


def parameters(compiled: Compiled) -> int:
    """Values of all weights, however they are stored."""
    return sum(math.prod(weight.shape) for weight in compiled.program.weights.values())


def _per_step(generations: Sequence[Generation]) -> float:
    steps = sum(g.steps for g in generations)
    return sum(g.step_tokens for g in generations) / steps if steps else 0.0
