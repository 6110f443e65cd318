"""The decoding loop: prefill, then steps of one token or of a verified draft tree, for rows that end on their own.

Speculation is the walk: at a node the model's own choice is drawn with noise keyed by its position; if a child holds
that token the walk goes down, else it stops. Every emitted token is the model's own, so that drafts change the number
of steps and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from ..ir.errors import SmeltError
from .drafters import Drafter, drafter
from .sampling import Context, Sampling, choose, not_finite
from .session import Draw, Session


@dataclass
class Row:
    """One sequence: its prompt, what was generated, and why it ended (`eos`, `length`, `stop`) if it has."""

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
        self.rows = [Row(list(prompt)) for prompt in prompts]
        self.counts = Counts()
        vocabulary = int(program.facts["vocabulary"])
        self._check(vocabulary, requests)
        self._requests = torch.tensor(list(range(len(self.rows)) if requests is None else requests))
        plan = program.decode if speculate else None
        self.drafter: Drafter | None = drafter(plan, vocabulary, len(prompts)) if plan else None
        parents, depths = (plan.tree.parents, plan.tree.depths) if plan else ((0,), (0,))
        self._depths = torch.tensor(depths)
        self._ancestors = _ancestors(parents) if plan else None
        self._children = _children(parents)
        penalized = sampling.repetition_penalty != 1
        self._seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool) if penalized else None
        draw = Draw(sampling.seed, sampling.temperature, self._requests)
        self._draw = draw if sampling.plain else None

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, tokens) until every row has ended; a row's first token comes out of its prompt."""
        for number, row in enumerate(self.rows):
            self._see(torch.full((len(row.prompt),), number), row.prompt)
        done = self.session.cache.lengths  # what a prefix has brought is not read again
        fresh = [row.prompt[length:] for row, length in zip(self.rows, done, strict=True)]
        outputs = self.session.prefill(fresh, self.drafter.harvest if self.drafter else None)
        everyone = torch.arange(len(self.rows))
        with _one_thread():
            first = self._choose(everyone, outputs["logits"], torch.tensor([len(row.prompt) for row in self.rows]))
        for number, token in enumerate(first):
            if self.drafter is not None:
                self.drafter.observe(number, 0, {name: value[:, None] for name, value in outputs.items()})
            yield number, self._emit(number, [token])
        chains = self._draw is not None and self.drafter is None and self.session.chains
        while not all(row.done for row in self.rows):
            yield from self._chain() if chains else self._step()

    def stop(self, number: int) -> None:
        """End a row early, such as at a stop string."""
        self.rows[number].done, self.rows[number].reason = True, "stop"

    def _check(self, vocabulary: int, requests: Sequence[int] | None) -> None:
        if not self.rows:
            raise SmeltError("generate: no prompt was given")
        if requests is not None and len(requests) != len(self.rows):
            raise SmeltError(f"generate: {len(self.rows)} prompts need as many request ids, not {len(requests)}")
        capacity = self.session.cache.capacity
        for number, row in enumerate(self.rows):
            if not row.prompt:
                raise SmeltError(f"generate: prompt {number} is empty; give at least one token")
            wrong = next((token for token in row.prompt if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise SmeltError(
                    f"generate: prompt {number} holds token {wrong}, the vocabulary has ids 0 to {vocabulary - 1}"
                )
            if len(row.prompt) + self.limits.new_tokens > capacity + 1:
                raise SmeltError(
                    f"generate: prompt {number} has {len(row.prompt)} tokens and {self.limits.new_tokens} more are "
                    f"asked for, but the context ends at {capacity}; shorten the prompt or max_new_tokens"
                )

    def _step(self) -> Iterator[tuple[int, list[int]]]:
        # the reference target computes on torch's own threads; generated kernels have theirs
        with _one_thread() if self.session.plan.target == "cpp" else nullcontext():
            fresh = self._verified()
        self.counts.steps += 1
        self.counts.tokens += sum(map(len, fresh))
        for number, tokens in enumerate(fresh):
            if tokens:
                yield number, self._emit(number, tokens)
        self.step_done()

    def _chain(self) -> Iterator[tuple[int, list[int]]]:
        """Steps of one token a row until one of the rows ends, or a page has to leave the cache."""
        assert self._draw is not None
        running = [number for number, row in enumerate(self.rows) if not row.done]
        room = self.session.cache.room()
        steps = min(min(room[n], self.limits.new_tokens - len(self.rows[n].tokens)) for n in running)
        tokens = [row.tokens[-1] for row in self.rows]
        with closing(self.session.chain(tokens, [not row.done for row in self.rows], steps, self._draw)) as chain:
            for chosen in chain:
                self.counts.steps += 1
                self.counts.tokens += len(running)
                for number in running:
                    row = self.rows[number]
                    if chosen[number] < 0:
                        raise not_finite(number, len(row.prompt) + len(row.tokens))
                    yield number, self._emit(number, [chosen[number]])
                self.step_done()
                if any(self.rows[number].done for number in running):
                    return

    def _verified(self) -> list[list[int]]:
        """Draft, evaluate, walk and commit; returns the tokens that each row got."""
        drafts = torch.stack([self._draft(number) for number in range(len(self.rows))])  # [B, N]
        running = torch.tensor([not row.done for row in self.rows])
        positions = torch.tensor(self.session.cache.lengths)[:, None] + self._depths
        valid = running[:, None] & (positions < self.session.cache.capacity)
        outputs = self.session.step(drafts, positions * valid, valid, self._ancestors, draw=self._draw)
        logits = outputs["logits"]
        paths, fresh = self._walk(drafts, positions, logits)
        for number, path in enumerate(paths):
            if self.drafter is not None and path:
                self.drafter.harvest(number, drafts[number][valid[number]], logits[number][valid[number]])
                self.drafter.observe(number, path[-1], outputs)
        self.session.cache.commit(paths)
        return fresh

    def _draft(self, number: int) -> torch.Tensor:
        """The tree's tokens of one row, [N]; whatever fits where they are not looked at."""
        row = self.rows[number]
        if self.drafter is None or row.done:
            return torch.full_like(self._depths, row.tokens[-1])
        return self.drafter.propose(number, row.tokens[-1])

    def _walk(
        self, drafts: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[list[list[int]], list[list[int]]]:
        """For each row the accepted nodes, and the tokens that the model chose behind each of them; all walk at once.

        A row that has ended has none. No path is longer than the cache has room for: the token that makes a page leave
        changes what the next one sees.
        """
        left = [
            0 if row.done else min(room, self.limits.new_tokens - len(row.tokens))
            for row, room in zip(self.rows, self.session.cache.room(), strict=True)
        ]
        tokens = drafts.tolist()
        paths: list[list[int]] = [[0] if steps else [] for steps in left]
        fresh: list[list[int]] = [[] for _ in left]
        walking = [number for number, steps in enumerate(left) if steps]
        while walking:
            chosen = self._behind(walking, [paths[number][-1] for number in walking], positions, logits)
            down = []
            for number, token in zip(walking, chosen, strict=True):
                fresh[number].append(token)
                children = self._children[paths[number][-1]]
                child = next((node for node in children if tokens[number][node] == token), None)
                if child is not None and len(paths[number]) < left[number] and token not in self.limits.eos:
                    paths[number].append(child)
                    down.append(number)
            walking = down
        return paths, fresh

    def _behind(
        self, rows: Sequence[int], nodes: Sequence[int], positions: torch.Tensor, logits: torch.Tensor
    ) -> list[int]:
        """The tokens that the model chooses behind these nodes of these rows: by the step's kernel, or from logits."""
        if self.session.chosen is None:
            at, behind = torch.tensor(rows), torch.tensor(nodes)
            return self._choose(at, logits[at, behind], positions[at, behind] + 1)
        chosen = [int(self.session.chosen[row, node]) for row, node in zip(rows, nodes, strict=True)]
        if -1 in chosen:
            first = chosen.index(-1)
            raise not_finite(rows[first], int(positions[rows[first], nodes[first]]) + 1)
        return chosen

    def _choose(self, rows: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor) -> list[int]:
        """The tokens [R] that rows [R] get behind logits [R, V], to stand at positions [R]; they count as seen."""
        context = None if self._seen is None else Context(self._seen[rows])
        processed = self.sampling.process(logits, context)
        chosen: list[int] = choose(processed, self.sampling, self._requests[rows], positions).tolist()
        self._see(rows, chosen)
        return chosen

    def _see(self, rows: torch.Tensor, tokens: Sequence[int]) -> None:
        if self._seen is not None:
            self._seen[rows, torch.tensor(tokens)] = True

    def _emit(self, number: int, tokens: list[int]) -> list[int]:
        row = self.rows[number]
        row.tokens += tokens
        if row.tokens[-1] in self.limits.eos:
            row.done, row.reason = True, "eos"
        elif len(row.tokens) >= self.limits.new_tokens:
            row.done, row.reason = True, "length"
        return tokens


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch on the calling thread: its others would spin on the cores that the next step needs.

    Two cores, 430 M parameters in 4 bits: 47 tokens/s with them, 78 without (2026-11-21).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ancestors(parents: Sequence[int]) -> torch.Tensor:
    """bool [N, N]: [i, j] where j is i or stands above it."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node in range(1, len(parents)):
        seen[node] |= seen[parents[node]]
    return seen


def _children(parents: Sequence[int]) -> list[list[int]]:
    """The children of every node, in order."""
    out: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if node:
            out[parent].append(node)
    return out
