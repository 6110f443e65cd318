"""What every way to continue a batch of prompts shares: its rows, when they end, and the draw from a row's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from ..ir.errors import SmeltError
from .constraint import Constraint
from .guide import Guide
from .reject import choose_tested
from .sampling import Context, Sampling, choose
from .session import Session


@dataclass
class Row:
    """One sequence: its prompt, what was generated, and why it ended (eos, grammar, length, stop) if it has."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    reason: str = ""


Heard = Callable[[Sequence[int]], bool]
"""Is told a text's tokens as they come, and says whether these end it."""


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `new_tokens`, or at one of `eos`.

    `listen` makes for a text what ends it early, such as at a stop string. Only a text that a search writes for itself
    asks it: who reads the answer ends that by `Writer.stop`.
    """

    new_tokens: int
    eos: frozenset[int] = frozenset()
    listen: Callable[[], Heard] = lambda: lambda tokens: False


@dataclass
class Counts:
    """What a generation took: model steps after the prompt, and tokens that they committed."""

    steps: int = 0
    tokens: int = 0


class Writer:
    """One generation over a batch of prompts; iterate `run()` for (row, new tokens) as they are decided."""

    ahead = 0
    """Tokens of the cache's room that a row takes beyond its prompt and all new tokens but the last."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits,
        requests: Sequence[int] | None = None,
        step_done: Callable[[], None] = lambda: None,
        constraint: Constraint | None = None,
    ) -> None:
        """`requests`: ids that key each row's noise, its row number by default. `step_done` is called after a step."""
        self.session, self.sampling, self.limits, self.step_done = session, sampling, limits, step_done
        self.rows = [Row(list(prompt)) for prompt in prompts]
        self.counts = Counts()
        self.vocabulary = int(session.plan.program.facts["vocabulary"])
        self._check(requests)
        self._requests = torch.tensor(list(range(len(self.rows)) if requests is None else requests))
        penalized = sampling.repetition_penalty != 1
        self._seen = torch.zeros(len(prompts), self.vocabulary, dtype=torch.bool) if penalized else None
        self._guides = [constraint.guide(prompt) for prompt in prompts] if constraint else None
        self._tests = constraint is not None and constraint.by == "reject"

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, tokens) until every row has ended."""
        raise NotImplementedError

    def stop(self, number: int) -> None:
        """End a row early, such as at a stop string."""
        self.rows[number].done, self.rows[number].reason = True, "stop"

    def others(self, number: int) -> tuple[tuple[int, ...], ...]:
        """Further answers of a row that has ended, best first, where a search found several."""
        return ()

    def log_weight(self, number: int) -> float | None:
        """Log of the estimated share of the model's law that a row's grammar left, where that is estimated."""
        return None if self._guides is None or self.sampling.greedy else self._guides[number].log_weight

    @property
    def running(self) -> list[int]:
        """The rows that have not ended."""
        return [number for number, row in enumerate(self.rows) if not row.done]

    def _check(self, requests: Sequence[int] | None) -> None:
        if not self.rows:
            raise SmeltError("generate: no prompt was given")
        if requests is not None and len(requests) != len(self.rows):
            raise SmeltError(f"generate: {len(self.rows)} prompts need as many request ids, not {len(requests)}")
        capacity = self.session.cache.capacity
        for number, row in enumerate(self.rows):
            if not row.prompt:
                raise SmeltError(f"generate: prompt {number} is empty; give at least one token")
            wrong = next((token for token in row.prompt if not 0 <= token < self.vocabulary), None)
            if wrong is not None:
                raise SmeltError(
                    f"generate: prompt {number} holds token {wrong}, the vocabulary has ids 0 to {self.vocabulary - 1}"
                )
            if len(row.prompt) + self.limits.new_tokens + self.ahead > capacity + 1:
                raise SmeltError(
                    f"generate: prompt {number} has {len(row.prompt)} tokens and {self.limits.new_tokens} more are "
                    f"asked for, but the context ends at {capacity}; shorten the prompt or max_new_tokens"
                )

    def _fresh(self) -> list[list[int]]:
        """The prompts' tokens that the cache does not hold, all of which count as seen: a prefix is not read again."""
        for number, row in enumerate(self.rows):
            self._count(torch.full((len(row.prompt),), number), row.prompt)
        return [row.prompt[length:] for row, length in zip(self.rows, self.session.cache.lengths, strict=True)]

    def _choose(self, rows: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor) -> list[int]:
        """The tokens [R] that rows [R] get behind logits [R, V], to stand at positions [R]; they count as seen."""
        processed, keys = self._processed(rows, logits), (self.sampling, self._requests[rows], positions)
        guides = self._tested(rows)
        chosen = choose_tested(processed, *keys, guides) if guides else choose(processed, *keys).tolist()
        self._see(rows, chosen)
        return chosen

    def _processed(self, rows: torch.Tensor, logits: torch.Tensor, paths: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [R, V] of rows [R] as the constraint and the sampling's options shape them.

        `paths` int64 [R, P]: further tokens that each has seen, such as those of a draft; padded by -1.
        """
        if self._guides is not None:
            held = zip(rows.tolist(), logits, strict=True)
            logits = torch.stack([self._guides[row].shape(each) for row, each in held])
        return self.sampling.process(logits, None if self._seen is None else Context(self._seen[rows], paths))

    def _tested(self, rows: torch.Tensor) -> list[Guide] | None:
        """The guides of rows [R] where tokens are tested one by one."""
        return [self._guides[row] for row in rows.tolist()] if self._guides and self._tests else None

    def _see(self, rows: torch.Tensor, tokens: Sequence[int]) -> None:
        """Rows [R] get these tokens: they count for penalties, and move their grammars on."""
        if self._guides is not None:
            for row, token in zip(rows.tolist(), tokens, strict=True):
                self._guides[row].take(token)
        self._count(rows, tokens)

    def _count(self, rows: torch.Tensor, tokens: Sequence[int]) -> None:
        if self._seen is not None:
            self._seen[rows, torch.tensor(tokens)] = True

    def _emit(self, number: int, tokens: list[int]) -> list[int]:
        row = self.rows[number]
        row.tokens += tokens
        if row.tokens[-1] in self.limits.eos:
            row.done, row.reason = True, "eos"
        elif self._guides is not None and self._guides[number].over:
            row.done, row.reason = True, "grammar"
        elif len(row.tokens) >= self.limits.new_tokens:
            row.done, row.reason = True, "length"
        return tokens

    def _quiet(self) -> AbstractContextManager[None]:
        """Where a step runs: the reference target computes on torch's own threads, generated kernels have theirs."""
        return one_thread() if self.session.plan.target == "cpp" else nullcontext()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch on the calling thread: its others would spin on the cores that the next step needs.

    Two cores, 430 M parameters in 4 bits: 47 tokens/s with them, 78 without (2026-11-21).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
