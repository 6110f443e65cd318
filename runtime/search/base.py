"""A search's loop: the law behind what each row holds, one choice of tokens, and what was chosen is read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from ...codegen.plan import Plan
from ...ir.choice import Search
from ...ir.errors import SmeltError
from ..constraint import Constraint
from ..sampling import Sampling, not_finite
from ..session import Session
from ..writer import Limits, Writer
from .forest import Forest

Options = TypeVar("Options", bound=Search)


class Searcher(Writer, Generic[Options]):
    """Asks `choose_behind` for every row's next tokens, in turn with steps that read what was chosen.

    Tokens that were chosen and that the cache does not hold yet are read by the next step. A search that has read them
    already, as nodes of `try_chains`, keeps them with `keep` and says what stands behind them.
    """

    def __init__(
        self,
        search: Options,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Limits,
        requests: Sequence[int] | None = None,
        step_done: Callable[[], None] = lambda: None,
        constraint: Constraint | None = None,
    ) -> None:
        self.search, self.ahead = search, search.ahead
        super().__init__(session, prompts, sampling, limits, requests, step_done, constraint)
        self._behind: dict[int, torch.Tensor] = {}
        self._forest: Forest | None = None

    @abstractmethod
    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        """New tokens of each running row, one at least, behind its logits [V].

        Limits of length and tokens that end a row are looked after by `run`, which cuts what stands behind them.
        """

    def watch_prompt(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        """Outputs [n, ...] at the next n tokens of the row's prompt, without logits."""

    def run(self) -> Iterator[tuple[int, list[int]]]:
        watch = self.watch_prompt if self.search.outputs else None
        logits = self.session.prefill(self._fresh(), watch=watch)["logits"]
        self._behind = {number: logits[number].float().clone() for number in range(len(self.rows))}
        while running := self.running:
            with self._quiet():
                self._read()
                fresh = self.choose_behind({number: self._behind[number] for number in running})
            stepped = self.counts.steps > 0  # what comes out of the prompt alone took no step
            for number in running:
                tokens = self._cut(number, fresh[number])
                self.counts.tokens += len(tokens) if stepped else 0
                for token in tokens:
                    self._see(torch.tensor([number]), [token])
                yield number, self._emit(number, tokens)
            self.step_done()

    def try_chains(self, chains: Mapping[int, Sequence[Sequence[int]]]) -> Mapping[str, torch.Tensor]:
        """One step that reads chains of tokens behind what rows hold; outputs [B, N, ...] until the next one.

        `self.forest` says which node is whose. Nothing stays in the cache without `keep`.
        """
        self._forest = forest = Forest([chains.get(number, ()) for number in range(len(self.rows))])
        positions = torch.tensor(self.session.cache.lengths)[:, None] + forest.depths
        valid = forest.real & (positions < self.session.cache.capacity)
        self.counts.steps += 1
        return self.session.step(forest.tokens, positions * valid, valid, forest.ancestors)

    @property
    def forest(self) -> Forest:
        """The nodes of the last `try_chains`."""
        assert self._forest is not None
        return self._forest

    def keep(self, kept: Mapping[int, tuple[int, int]]) -> None:
        """Commit of the last `try_chains` these: for a row a chain, and how many of its tokens."""
        self.session.cache.commit(self.forest.paths(kept))

    def place(self, number: int) -> int:
        """The position of the row's next token."""
        row = self.rows[number]
        return len(row.prompt) + len(row.tokens)

    def left(self, number: int) -> int:
        """How many more tokens the row may get."""
        return self.limits.new_tokens - len(self.rows[number].tokens)

    def law(self, number: int, logits: torch.Tensor, path: Sequence[int] = ()) -> torch.Tensor:
        """Logits [V] of a row, behind further tokens of a trial, as constraint and options shape them."""
        paths = torch.tensor([list(path)], dtype=torch.int64) if path else None
        return self.finite(number, self._processed(torch.tensor([number]), logits[None], paths)[0], path)

    def finite(self, number: int, law: torch.Tensor, path: Sequence[int] = ()) -> torch.Tensor:
        """The same logits [V] of a row, behind further tokens; SmeltError where the greatest is no number."""
        if not law.amax().isfinite():
            raise not_finite(number, self.place(number) + len(path))
        return law

    def check_context(self, what: str, texts: Sequence[Sequence[int]], plan: Plan) -> None:
        """Raises SmeltError for texts, called `what`, that a plan's model cannot hold with an answer behind them."""
        context, cache = plan.program.facts.get("context"), plan.program.cache
        new = 1 if cache is not None and cache.endless else self.limits.new_tokens
        for number, text in enumerate(texts):
            if context is not None and len(text) + new - 1 > context:
                raise SmeltError(
                    f"generate: {what} {number} has {len(text)} tokens and {self.limits.new_tokens} come behind it, "
                    f"but the context of {plan.program.name} is {context}; shorten it or max_new_tokens"
                )

    def _read(self) -> None:
        """Read what the cache does not hold of rows that go on."""
        unread = {}
        for number in self.running:
            row = self.rows[number]
            missing = self.place(number) - self.session.cache.lengths[number]
            if missing:
                unread[number] = row.tokens[-missing:]
        if not unread:
            return
        logits = self.try_chains({number: [tokens] for number, tokens in unread.items()})["logits"]
        for number, tokens in unread.items():
            self._behind[number] = logits[number, len(tokens) - 1].float().clone()
        self.keep({number: (0, len(tokens)) for number, tokens in unread.items()})

    def _cut(self, number: int, tokens: Sequence[int]) -> list[int]:
        """As many of these tokens as the row may get."""
        held = list(tokens[: self.left(number)])
        end = next((at for at, token in enumerate(held) if token in self.limits.eos), None)
        return held if end is None else held[: end + 1]
