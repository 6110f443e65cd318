"""The decoding loop: prefill, then steps of one token or of a verified draft tree, for rows that end on their own.

Speculation is the walk: at a node the model's own choice is drawn with noise keyed by its position; if a child holds that
token the walk goes down, else it stops. Every emitted token is the model's own, so that drafts change the number of
steps and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..ir.errors import SmeltError
from .drafters import Drafter, drafter
from .sampling import Context, Sampling, choose, tree_paths
from .session import Session


@dataclass
class Row:
    """One sequence: its prompt, what was generated, and whether it still runs."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `new_tokens`, or at one of `eos`."""

    new_tokens: int
    eos: frozenset[int] = frozenset()


@dataclass
class Counts:
    """What a generation took: model steps after the prompt, and tokens that they committed."""

    steps: int = 0
    tokens: int = 0


class Decoding:
    """One generation over a batch of prompts; iterate `run()` for (row, new tokens) as they are decided."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits,
        speculate: bool = True,
        requests: Sequence[int] | None = None,
        step_done: Callable[[], None] = lambda: None,
    ) -> None:
        """`requests`: ids that key each row's noise, its row number by default. `step_done` is called after a step."""
        program = session.plan.program
        self.session, self.sampling, self.limits, self.step_done = session, sampling, limits, step_done
        self.rows = [Row(list(p)) for p in prompts]
        self.requests = list(range(len(prompts))) if requests is None else list(requests)
        self.counts = Counts()
        vocabulary = int(program.facts["vocabulary"])
        self._check(vocabulary)
        plan = program.decode if speculate else None
        self.tree = plan.tree if plan else None
        self.drafter: Drafter | None = drafter(plan, vocabulary, len(prompts)) if plan else None
        self._parents = torch.tensor(self.tree.parents if self.tree else (0,))
        self._depths = torch.tensor(self.tree.depths if self.tree else (0,))
        self._ancestors = _ancestors(self._parents) if self.tree else None
        self._children = _children(self._parents)
        penalized = sampling.repetition_penalty != 1
        self._seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool) if penalized else None

    def _check(self, vocabulary: int) -> None:
        if not self.rows:
            raise SmeltError("generate: no prompt was given")
        for number, row in enumerate(self.rows):
            if not row.prompt:
                raise SmeltError(f"generate: prompt {number} is empty; give at least one token")
            wrong = next((t for t in row.prompt if not 0 <= t < vocabulary), None)
            if wrong is not None:
                raise SmeltError(f"generate: prompt {number} holds token {wrong}, the vocabulary has ids 0 to {vocabulary - 1}")
            if len(row.prompt) + self.limits.new_tokens > self.session.cache.capacity + 1:
                raise SmeltError(
                    f"generate: prompt {number} has {len(row.prompt)} tokens and {self.limits.new_tokens} more are asked "
                    f"for, but the context ends at {self.session.cache.capacity}; shorten the prompt or max_new_tokens"
                )

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, tokens) until every row has ended; a row's first token comes out of its prompt."""
        for number, row in enumerate(self.rows):
            self._see(number, row.prompt)
        outputs = self.session.prefill([r.prompt for r in self.rows], self.drafter.harvest if self.drafter else None)
        logits = outputs["logits"]
        for number, row in enumerate(self.rows):
            if self.drafter is not None:
                self.drafter.observe(number, 0, {k: v[:, None] for k, v in outputs.items()})
            token = self._choose(number, logits[number : number + 1], torch.tensor([len(row.prompt)]), None)[0]
            yield number, self._emit(number, [token])
        self.counts.tokens = 0  # a prompt's own token takes no step
        while not all(row.done for row in self.rows):
            yield from self._step()
            self.step_done()

    def _step(self) -> Iterator[tuple[int, list[int]]]:
        lengths = torch.tensor(self.session.cache.lengths)
        drafts = torch.stack([self._draft(number) for number in range(len(self.rows))])
        running = torch.tensor([not row.done for row in self.rows])
        positions = (lengths[:, None] + self._depths) * running[:, None]
        valid = (running[:, None] & (positions < self.session.cache.capacity)).contiguous()
        outputs = self.session.step(drafts, positions * valid, valid, self._ancestors)
        room, accepted, fresh = self.session.cache.room(), [], []
        for number, row in enumerate(self.rows):
            path, tokens = ([], []) if row.done else self._walk(number, drafts[number], positions[number], outputs["logits"][number], room[number])
            accepted.append(path)
            fresh.append(tokens)
            if self.drafter is not None and path:
                self.drafter.harvest(number, drafts[number][valid[number]], outputs["logits"][number][valid[number]])
                self.drafter.observe(number, path[-1], outputs)
        self.session.cache.commit(accepted)
        self.counts.steps += 1
        for number, tokens in enumerate(fresh):
            if tokens:
                yield number, self._emit(number, tokens)

    def _draft(self, number: int) -> torch.Tensor:
        row = self.rows[number]
        root = row.tokens[-1] if row.tokens else 0
        if self.drafter is None or row.done:
            return torch.full((len(self._parents),), root, dtype=torch.int64)
        return self.drafter.propose(number, root)

    def _walk(
        self, number: int, drafts: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor, room: int
    ) -> tuple[list[int], list[int]]:
        """Accepted nodes and the tokens that the model chose behind each of them."""
        row = self.rows[number]
        left = min(room, self.limits.new_tokens - len(row.tokens))
        chosen = self._choose(number, logits, positions + 1, drafts)
        tokens, path, fresh = drafts.tolist(), [0], [chosen[0]]
        while len(path) < left and fresh[-1] not in self.limits.eos:
            child = next((c for c in self._children[path[-1]] if tokens[c] == fresh[-1]), None)
            if child is None:
                break
            path.append(child)
            fresh.append(chosen[child])
        return path, fresh

    def _choose(self, number: int, logits: torch.Tensor, positions: torch.Tensor, drafts: torch.Tensor | None) -> list[int]:
        context = None
        if self._seen is not None:
            paths = tree_paths(drafts, self._parents) if drafts is not None else None
            context = Context(self._seen[number], paths)
        processed = self.sampling.process(logits, context)
        return choose(processed, self.sampling, self.requests[number], positions).tolist()

    def _see(self, number: int, tokens: Sequence[int]) -> None:
        if self._seen is not None and tokens:
            self._seen[number, torch.tensor(tokens)] = True

    def _emit(self, number: int, tokens: list[int]) -> list[int]:
        row = self.rows[number]
        self._see(number, tokens)
        row.tokens += tokens
        self.counts.tokens += len(tokens)
        if row.tokens[-1] in self.limits.eos:
            row.done, row.reason = True, "eos"
        elif len(row.tokens) >= self.limits.new_tokens:
            row.done, row.reason = True, "length"
        return tokens

    def stop(self, number: int) -> None:
        """End a row early, such as at a stop string."""
        self.rows[number].done, self.rows[number].reason = True, "stop"


def _ancestors(parents: torch.Tensor) -> torch.Tensor:
    """bool [N, N]: [i, j] where j is i or stands above it."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node in range(1, len(parents)):
        seen[node] |= seen[parents[node]]
    return seen


def _children(parents: torch.Tensor) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents.tolist()):
        if node:
            out[parent].append(node)
    return out
