"""The decoding loop: prefill, then steps of one token or of a verified draft tree, for rows that end on their own.

Speculation is the walk: at a node the model's own choice is drawn with noise keyed by its position; if a child holds
that token the walk goes down, else it stops. Every emitted token is the model's own, so that drafts change the number
of steps and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property

import torch

from ..ir.errors import SmeltError
from .accept import Standing, Walker, acceptor
from .constraint import Constraint
from .drafters.base import Drafted, Drafter, Outputs, Verified
from .drafters.make import Setting, drafter
from .pace import Emitted, Pace
from .sampling import Sampling, not_finite
from .session import Draw, Session, Watch
from .trees import Trees
from .writer import Limits, Writer, one_thread


class Decoding(Writer):
    """Draws from the model's law, a token a step or as many as of a draft are accepted."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits,
        speculate: bool = True,
        requests: Sequence[int] | None = None,
        step_done: Callable[[], None] = lambda: None,
        constraint: Constraint | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`requests`: ids that key each row's noise, its row number by default. `step_done` is called after a step.

        `pace`: what is known of how well drafting pays, by which it pauses where no token depends on it.
        """
        super().__init__(session, prompts, sampling, limits, requests, step_done, constraint)
        program = session.plan.program
        plan = program.decode if speculate else None
        if plan is not None and plan.limit(sampling.greedy) == 0:
            plan = None
        setting = Setting(session, sampling, self._requests)
        self.drafter: Drafter | None = drafter(plan, self.vocabulary, setting) if plan else None
        self._accept = acceptor(plan) if plan else Walker()
        if self._tests and not (self._accept.plain and (sampling.greedy or sampling.unwarped)):
            raise SmeltError(
                "generate: constrain='reject' draws from the whole law, at any temperature: leave out top_k, top_p, "
                "min_p, typical_p and drafts that are not accepted by walk (speculate=False), or use constrain='mask'"
            )
        draw = Draw(sampling.seed, sampling.temperature, self._requests)
        self._draw = draw if sampling.plain and self._guides is None else None
        drafted = self.drafter is not None and self._accept.plain
        resting = program.depth is not None or (program.draft is not None and program.draft.depth is not None)
        self._pace = pace if drafted and not resting else None
        self._untold = [0] * len(self.rows)  # newest tokens of each row that the drafter has not heard of

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (row, tokens) until every row has ended; a row's first token comes out of its prompt."""
        try:
            yield from self._decided()
        finally:
            for guide in self._guides or ():
                guide.close()

    def _decided(self) -> Iterator[tuple[int, list[int]]]:
        harvest = self.drafter.harvest if self.drafter and self.drafter.harvests else None
        outputs = self.session.prefill(self._fresh(), harvest, watch=self._watch)
        everyone = torch.arange(len(self.rows))
        with one_thread():
            first = self._choose(everyone, outputs["logits"], torch.tensor([len(row.prompt) for row in self.rows]))
        for number, token in enumerate(first):
            if self.drafter is not None:
                told = {name: value[number][None] for name, value in outputs.items()}
                self.drafter.observe(number, Verified((), (0,), told))
                self.drafter.begin(number, [*self.rows[number].prompt, token])
            yield number, self._emit(number, [token])
        while not all(row.done for row in self.rows):
            drafts = self.drafter is not None and (self._pace is None or self._pace.drafts)
            steps = self._step(drafts) if drafts or not self._chains else self._chain()
            for emitted in steps if self._pace is None else self._pace.watched(steps):
                yield from emitted

    @property
    def _watch(self) -> Watch | None:
        """Who wants to see the model's other outputs."""
        return self.drafter.watch if self.drafter is not None and self.drafter.watches else None

    @cached_property
    def _chains(self) -> bool:
        """Whether steps without a draft need nothing of the host."""
        return self._draw is not None and self.session.chains

    def _step(self, drafts: bool) -> Generator[Emitted, None, None]:
        with self._quiet():
            fresh = self._verified(drafts)
        self.counts.steps += 1
        self.counts.tokens += sum(map(len, fresh))
        self.step_done()
        yield [(number, self._emit(number, tokens)) for number, tokens in enumerate(fresh) if tokens]

    def _chain(self) -> Generator[Emitted, None, None]:
        """Steps of one token a row until one of the rows ends, or a page has to leave the cache."""
        assert self._draw is not None
        running = self.running
        room = self.session.cache.room()
        steps = min(min(room[n], self.limits.new_tokens - len(self.rows[n].tokens)) for n in running)
        tokens, watch = [row.tokens[-1] for row in self.rows], self._watch
        chain = self.session.chain(tokens, [not row.done for row in self.rows], steps, self._draw, watch)
        with closing(chain):
            for chosen in chain:
                self.counts.steps += 1
                self.counts.tokens += len(running)
                for number in running:
                    row = self.rows[number]
                    if chosen[number] < 0:
                        raise not_finite(number, len(row.prompt) + len(row.tokens))
                    self._untold[number] += 1
                self.step_done()
                yield [(number, self._emit(number, [chosen[number]])) for number in running]
                if any(self.rows[number].done for number in running):
                    return

    def _verified(self, drafts: bool) -> list[list[int]]:
        """Draft, evaluate, walk and commit; returns the tokens that each row got."""
        tree = Trees(self._drafts(drafts), self.drafter is not None and self.drafter.fixed)
        cache = self.session.cache
        positions = tree.behind(cache.lengths)
        whole = tree.whole and max(cache.lengths) + tree.deepest < cache.capacity
        if whole and not any(row.done for row in self.rows):  # the usual case, without ten small tensors
            valid, at = tree.real, positions
        else:
            running = torch.tensor([not row.done for row in self.rows])
            valid = running[:, None] & tree.real & (positions < cache.capacity)
            at = positions * valid
        draw = self._draw if self._accept.plain else None
        outputs = self.session.step(tree.tokens, at, valid, tree.ancestors, draw=draw)
        kernels = self.session.chosen if self._accept.plain else None
        chosen = None if kernels is None else kernels.tolist()
        paths, fresh = self._walk(tree, positions, outputs, chosen)
        if self.drafter is not None:
            self._tell(self.drafter, drafts, tree, valid, outputs, paths, fresh, chosen)
        self.session.cache.commit(paths)
        return fresh

    def _drafts(self, drafts: bool) -> list[Drafted]:
        """What each row drafts; one that has ended, where nothing is looked at, what another one does."""
        running = self.running
        if self.drafter is None or not drafts:
            made = {number: Drafted.chain(self.rows[number].tokens[-1:]) for number in running}
        else:
            for number in running:
                if untold := self._untold[number]:
                    self.drafter.begin(number, self.rows[number].tokens[-untold:])
                    self._untold[number] = 0
            made = self.drafter.propose_all(running)
        some = next(iter(made.values()))
        return [made.get(number, some) for number in range(len(self.rows))]

    def _tell(
        self,
        drafter: Drafter,
        drafts: bool,
        tree: Trees,
        valid: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        paths: Sequence[Sequence[int]],
        fresh: Sequence[Sequence[int]],
        chosen: Sequence[Sequence[int]] | None,
    ) -> None:
        """Let the drafter learn from the step, even if it did not draft."""
        for number, path in enumerate(paths):
            if not path:
                continue
            if drafter.harvests:
                tokens, logits = tree.tokens[number], outputs["logits"][number]
                if not ((tree.whole and valid is tree.real) or valid[number].all()):  # a mask copies the logits
                    tokens, logits = tokens[valid[number]], logits[valid[number]]
                drafter.harvest(number, tokens, logits)
            told = Outputs(outputs, number)
            if drafts:
                drafter.observe(number, Verified(fresh[number], path, told, None if chosen is None else chosen[number]))
                continue
            self._untold[number] += len(fresh[number])
            if drafter.watches:
                drafter.watch(number, {name: told[name][:1] for name in told if name != "logits"})

    def _walk(
        self,
        tree: Trees,
        positions: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        chosen: Sequence[Sequence[int]] | None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """For each row the accepted nodes, and the tokens that come behind each of them; all rows walk at once.

        A row that has ended has none. No path is longer than the cache has room for: the token that makes a page leave
        changes what the next one sees. `chosen` [B][N]: what the kernels chose, if they do and the rule takes it.
        """
        left = [
            0 if row.done else min(room, self.limits.new_tokens - len(row.tokens))
            for row, room in zip(self.rows, self.session.cache.room(), strict=True)
        ]
        paths: list[list[int]] = [[0] if steps else [] for steps in left]
        fresh: list[list[int]] = [[] for _ in left]
        walking = [number for number, steps in enumerate(left) if steps]
        while walking:
            down = []
            for number, token, child in self._behind(walking, paths, tree, positions, outputs, chosen):
                fresh[number].append(token)
                ends = token in self.limits.eos or (self._guides is not None and self._guides[number].over)
                if child is not None and len(paths[number]) < left[number] and not ends:
                    paths[number].append(child)
                    down.append(number)
            walking = down
        return paths, fresh

    def _behind(
        self,
        rows: Sequence[int],
        paths: Sequence[Sequence[int]],
        tree: Trees,
        positions: torch.Tensor,
        outputs: Mapping[str, torch.Tensor],
        chosen: Sequence[Sequence[int]] | None,
    ) -> Iterator[tuple[int, int, int | None]]:
        """(row, token, its node if it was drafted) behind the last node of each row's path; `chosen` as in `_walk`."""
        nodes = [paths[number][-1] for number in rows]
        if chosen is not None:
            for number, node in zip(rows, nodes, strict=True):
                token = chosen[number][node]
                if token < 0:
                    raise not_finite(number, int(positions[number, node]) + 1)
                yield number, token, tree.child(number, node, token)
            return
        at, behind = torch.tensor(rows), torch.tensor(nodes)
        processed = self._processed(at, outputs["logits"][at, behind])
        keys = self._requests[at], positions[at, behind] + 1
        standing = Standing(processed, self.sampling, *keys, self._tested(at))
        drafted = [tree.below(number, node) for number, node in zip(rows, nodes, strict=True)]
        found = self._accept.behind(standing, drafted, [paths[number] for number in rows])
        self._see(at, [token for token, _ in found])
        yield from ((number, token, child) for number, (token, child) in zip(rows, found, strict=True))
