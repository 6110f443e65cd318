"""The cache store in plain PyTorch: what a cache plan means, row by row; the oracle for every attention kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from ..errors import SmeltError
from .attend import attend_row
from .hyper import hyper_attend
from .links import check_lists, foresee
from .options import Rope
from .plan import CachePlan, Counts, Site
from .retrieve import retrieved
from .schedule import Schedule
from .segments import Segments, keep
from .step import Step

Indices: TypeAlias = torch.Tensor | Sequence[Sequence[int]]


class Bytes(NamedTuple):
    """Measured bytes: what the stored tokens take, and what all buffers take."""

    used: int
    allocated: int


class Cache:
    """Keys and values of `batch` rows, each with its own length, stored as a cache plan says.

    A step is `begin`, then `append` and `attend` for every layer, then `commit`. Tokens that are not committed leave no
    trace. Before `end_prefill` (`end_chunk`) everything stays in the tail, so that a prompt is read as it was written;
    from then on pages leave as the plan says. What a row stores is a function of its committed tokens alone: not of the
    steps that brought them, nor of the other rows. Positions count a row's tokens from 0.

    `capacity`: most tokens a row may hold. `scratch`: new tokens a step may bring before buffers grow.
    `generation` changes whenever a buffer moves: whoever holds an address must fetch it again.
    """

    def __init__(
        self, plan: CachePlan, batch: int, capacity: int, device: str | torch.device = "cpu", scratch: int = 64
    ) -> None:
        if capacity < 1 or batch < 1:
            raise SmeltError(f"a cache needs at least one row and one token, not batch {batch}, capacity {capacity}")
        self.plan, self.capacity, self.scratch = plan, capacity, scratch
        self.device = torch.device(device)
        self.generation = 0
        self.prefilling = True
        self.lengths = [0] * batch
        self.prompts = [0] * batch
        self.step: Step | None = None
        self.keep = keep  # who has a kernel for it puts it here
        self.ids: list[list[int]] = [[] for _ in range(batch)]  # of the prompts, where a policy asks
        self._new: list[list[int]] | None = None
        self._profiles = any(site.select is not None and site.select.policy is not None for site in plan.sites)
        self.segments: dict[int, Segments] = {}
        self._turns: dict[Rope, torch.Tensor] = {}
        self.picked: dict[tuple[int, int], torch.Tensor] = {}  # of a step, by layer and row: what is read of the body
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._schedule_of: dict[int, Schedule] = {}
        self.resting: frozenset[int] = frozenset()  # layers that are not read any more: see `rest`
        for site in plan.sites:
            numbers = range(len(site.caps))
            tables = [plan.tables_of(site.layer, number) for number in numbers]
            segments = Segments(site, batch, self._least_width(site), self.device, tables, capacity)
            self.segments[site.layer] = segments
            key = (site.sink, site.tail, site.page, site.caps, site.hold, site.tiers, site.select, site.estimate)
            schedule = self._schedules.setdefault(key, Schedule(site, batch, self.device))
            schedule.members.append(segments)
            self._schedule_of[site.layer] = schedule
        foresee(plan, self.segments, self.device)
        check_lists(plan, self._schedule_of)

    @property
    def batch(self) -> int:
        """Rows, B."""
        return len(self.lengths)

    @property
    def empty(self) -> bool:
        """Whether no row holds a token: what comes next begins every prompt."""
        return self.prefilling and not any(self.lengths)

    def _least_width(self, site: Site) -> int:
        """Tail slots that serve every length once the prompt is encoded."""
        longest = self.capacity if site.tail is None else min(self.capacity, site.sink + site.tail + site.page)
        return longest + self.scratch

    def counts(self, layer: int) -> torch.Tensor:
        """int32 [B, 4], updated in place: what a layer stores of each row in sink, bodies and tail, and its length.

        Where KV heads have their own numbers of tokens, that of the bodies is their average; `Body.held` tells all.
        """
        return self._schedule_of[layer].table

    @property
    def tables(self) -> list[torch.Tensor]:
        """The distinct tables of `counts`."""
        return [schedule.table for schedule in self._schedules.values()]

    def stored(self, layer: int) -> list[int]:
        """Stored tokens per KV head of each row, on average."""
        return [sum(counts) for counts in self._schedule_of[layer].counts]

    def turns(self, layer: int) -> torch.Tensor | None:
        """cos and sin of every position's angles, float32 [positions, 2 R], for kernels that turn keys; None: no rope.

        Sites of one rope share it. Positions up to the capacity and a step's new tokens.
        """
        rope = self.plan[layer].rope
        if rope is None:
            return None
        if rope not in self._turns:
            angle = torch.arange(self.capacity + self.scratch)[:, None].float() * torch.tensor(rope.inverse)
            self._turns[rope] = torch.cat([torch.cos(angle), torch.sin(angle)], 1).to(self.device)
        return self._turns[rope]

    def room(self) -> list[int]:
        """Tokens each row may commit before a page leaves (the one that makes it leave included) or the context ends.

        Whoever accepts no more than this sees the same cache as one who commits token by token.
        """
        out = []
        for length, prompt in zip(self.lengths, self.prompts, strict=True):
            rooms = [] if self.prefilling else [s.site.room(length, prompt) for s in self._schedules.values()]
            out.append(min([self.capacity - length, *(room for room in rooms if room is not None)]))
        return out

    def begin(
        self,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        ancestors: torch.Tensor | None = None,
        room: int = 0,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Announce a step of T new tokens a row; what an unfinished step wrote is dropped.

        `positions` int64 [B, T]; `valid` bool [B, T] marks the real ones (default all). Without `ancestors` the valid
        tokens of a row continue it, and query i sees every stored token and the new tokens up to its own position.
        `ancestors` bool [T, T] or [B, T, T]: a tree, in which i sees every stored token and exactly the new tokens j
        with ancestors[i, j], and itself. `room`: slots to hold ready where kernels take so many steps before `advance`.
        `tokens` int64 [B, T]: ids, which policies by class look at when a prompt ends.
        """
        if positions.shape[:1] != (self.batch,) or positions.dim() != 2:
            raise ValueError(f"positions must be [{self.batch}, T], not {list(positions.shape)}")
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        if ancestors is None:
            self._check_continues(positions, valid)
        self._reserve(max(positions.shape[1], room))
        self.picked.clear()
        self.step = Step(positions.contiguous(), valid, ancestors)
        told = tokens is not None and self.prefilling and self._profiles
        self._new = tokens.tolist() if tokens is not None and told else None

    def _check_continues(self, positions: torch.Tensor, valid: torch.Tensor) -> None:
        """Every valid token must stand right behind the row's last one, within the context."""
        if positions.shape[1] == 1:
            fresh = [int(v) for v in valid[:, 0].tolist()]
            wrong = [v and p != n for p, v, n in zip(positions[:, 0].tolist(), fresh, self.lengths, strict=True)]
        else:
            fresh = valid.sum(1).tolist()
            lengths = torch.tensor(self.lengths, device=positions.device)
            expected = lengths[:, None] + valid.cumsum(1) - 1
            wrong = ((positions != expected) & valid).any(1).tolist()
        if any(wrong):
            row = wrong.index(True)
            raise ValueError(f"row {row}: new tokens must continue its {self.lengths[row]} tokens without a gap")
        for row, (length, new) in enumerate(zip(self.lengths, fresh, strict=True)):
            self._check_fits(row, length + new)

    def _check_fits(self, row: int, length: int) -> None:
        if length > self.capacity:
            raise SmeltError(
                f"sequence {row} would reach {length} tokens, but the cache was made for a context of {self.capacity}: "
                "shorten the prompt, ask for fewer tokens, or raise the context limit"
            )

    def _reserve(self, new: int) -> None:
        """Make room for `new` tokens behind every tail; a prompt that comes in pieces doubles the tail each time."""
        for schedule in self._schedules.values():
            used = schedule.aim()
            need, width = max(used) + new, schedule.members[0].width
            if need <= width:
                continue
            width = max(need, min(2 * width, self.capacity + new) if max(used) else 0)
            for segments in schedule.members:
                segments.resize_tail(width, used)
            self.generation += 1

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the step's keys [B, G, T, D] and values [B, G, T, E] behind the tail of a layer."""
        self._current()
        schedule = self._schedule_of[layer]
        self.segments[layer].write(schedule.offsets, schedule.even, k=k, v=v)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q [B, H, T, D] over a layer's stored and visible new tokens → [B, H, T, E].

        Rows of the result whose token is not valid are zero. `window`, `softcap`, `sinks`: as in `smelt::attention`.
        """
        step, schedule, segments = self._current(), self._schedule_of[layer], self.segments[layer]
        segments.sink_logits = sinks
        if segments.site.watches:
            segments.write(schedule.offsets, schedule.even, q=q)
        plain = window is None and softcap is None and sinks is None and step.ancestors is None
        long = segments.site.hyper is not None and step.tokens > segments.site.hyper.min_seq_len
        if long and plain and self.empty:
            return self._attend_prompts(layer, q, scale)
        out = []
        for row, (length, counts) in enumerate(zip(self.lengths, schedule.counts, strict=True)):
            reads = segments.read(row, length, counts, step.positions[row])
            if segments.site.retrieve is not None:
                reads = retrieved(self, layer, row, q[row], reads, scale, window, softcap)
            out.append(attend_row(q[row], step, row, reads, scale, window, softcap, sinks))
        return torch.stack(out)

    def _attend_prompts(self, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """`attend` where every row's prompt comes as a whole, at a site that approximates long ones."""
        step, segments = self._current(), self.segments[layer]
        assert segments.site.hyper is not None
        out = q.new_zeros(*q.shape[:3], segments.site.value_dim)
        for row, real in enumerate(step.valid):
            keys, values = (x[row, :, : step.tokens][:, real].float() for x in (segments.tail_k, segments.tail_v))
            mixed = hyper_attend(q[row][:, real], keys, values, scale, segments.site.hyper, layer)
            out[row][:, real] = mixed.to(q.dtype)
        return out

    def commit(self, accepted: Indices) -> None:
        """Keep these of the step's new tokens, in this order, and drop the rest; then let pages leave that are due.

        `accepted`: for each row, indices into its new tokens; rows are padded with -1.
        """
        step = self._current()
        rows = accepted.tolist() if isinstance(accepted, torch.Tensor) else accepted
        if len(rows) != self.batch:
            raise ValueError(f"commit takes one list for each of {self.batch} rows, not {len(rows)}")
        for row, indices in enumerate(rows):
            kept = [i for i in indices if i >= 0]
            if kept:
                self._commit_row(row, kept, step.tokens)
        self.step = None

    def advance(self, steps: int, rows: Sequence[int]) -> None:
        """Commit so many steps of one token of these rows: kernels wrote keys and values, and moved `tables` on.

        No more than `room` allows: no page leaves between them.
        """
        self._current()
        for row in rows if steps else ():
            self._check_fits(row, self.lengths[row] + steps)
            self._settle(row, self.lengths[row], self.lengths[row] + steps)
        self.step = None

    def _commit_row(self, row: int, kept: list[int], new: int) -> None:
        length = self.lengths[row] + len(kept)
        if max(kept) >= new:
            raise ValueError(f"row {row}: cannot commit new token {max(kept)} of a step of {new}")
        self._check_fits(row, length)
        if self._new is not None:
            self.ids[row] += [self._new[row][i] for i in kept]
        if kept != list(range(len(kept))):
            for schedule in self._schedules.values():
                self.keep(schedule.members, self.generation, row, schedule.counts[row].tail, kept)
        self._settle(row, self.lengths[row], length)

    def _settle(self, row: int, before: int, length: int) -> None:
        """Take a row from one committed length to the next: pages that are due leave, counts follow."""
        for schedule in self._schedules.values():
            site, prompt, held = schedule.site, self.prompts[row], schedule.counts[row]
            if self.prefilling:
                schedule.set(row, held._replace(tail=held.tail + length - before), length)
                continue
            was = self.lengths[row] - held.sink - held.tail
            now, counts = site.left(length, prompt), site.counts(length, prompt)
            if was < now:
                self._leave(schedule, row, before, (was, now), counts.tail)
            schedule.set(row, counts, length)
        self.lengths[row] = length

    def _leave(self, schedule: Schedule, row: int, before: int, left: tuple[int, int], tail: int) -> None:
        """Let tokens left[0] … left[1] - 1 behind the sinks leave the tails of a schedule's members.

        `before`: the committed length at which the last ones left; 0 at the end of the prompt and of its chunks.
        """
        site = schedule.site
        prompt = site.at_prompt and not before and (self.prefilling or self.prompts[row] > site.sink + (site.tail or 0))
        for segments in schedule.members:
            if segments.site.layer in self.resting:
                continue
            segments.leave(row, *left, tail, prompt, self.ids[row])
            for body in segments.bodies:
                if body.moved:
                    body.moved = False
                    self.generation += 1

    def rest(self, layers: frozenset[int]) -> None:
        """From now on no step reads or writes these layers, until `restart`; what they hold counts as gone."""
        self.resting |= layers

    def restart(self) -> None:
        """Forget every token; buffers stay."""
        self.resting = frozenset()
        self.lengths, self.prompts, self.ids = [0] * self.batch, [0] * self.batch, [[] for _ in self.lengths]
        self.prefilling, self.step = True, None
        for schedule in self._schedules.values():
            for row in range(self.batch):
                schedule.set(row, Counts(0, 0, 0), 0)
                for segments in schedule.members:
                    segments.clear(row)

    def end_chunk(self, questions: Sequence[int]) -> None:
        """A chunk of each row's prompt ends: sites that read in chunks keep what the question behind it attends to.

        `questions`: its tokens, which every site gives back, so that the next chunk continues this one; 0: none ends.
        """
        for row in (row for row, question in enumerate(questions) if question):
            length = self.lengths[row] - questions[row]
            for schedule in self._schedules.values():
                held, counts = schedule.counts[row], schedule.site.chunked(length)
                was, now = self.lengths[row] - held.sink - held.tail, length - counts.sink - counts.tail
                if was < now:
                    self._leave(schedule, row, 0, (was, now), questions[row])
                schedule.set(row, counts, length)
            self.lengths[row] = length
            del self.ids[row][length:]

    def end_prefill(self) -> None:
        """The prompt is complete: encode what left the tail, page by page, and free the space it took."""
        if not self.prefilling:
            return
        self.prefilling, self.step = False, None
        self.prompts = list(self.lengths)
        for row, length in enumerate(self.lengths):
            self._settle(row, 0, length)
        for schedule in self._schedules.values():
            width = self._least_width(schedule.site)
            for segments in schedule.members:
                if segments.width > width:
                    segments.resize_tail(width, schedule.aim())
        self.generation += 1

    def select_rows(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is copied, one not named is dropped."""
        index = torch.tensor(list(indices), device=self.device)
        for schedule in self._schedules.values():
            schedule.take_rows(list(indices))
            for segments in schedule.members:
                segments.take_rows(list(indices), index)
        self.lengths = [self.lengths[i] for i in indices]
        self.prompts, self.ids = [self.prompts[i] for i in indices], [list(self.ids[i]) for i in indices]
        self.step = None
        self.generation += 1

    def nbytes(self) -> Bytes:
        """Measured bytes: in use by stored tokens, and allocated."""
        used = 0
        for layer, segments in self.segments.items():
            if layer in self.resting:
                continue
            used += sum(segments.used_bytes(row, c) for row, c in enumerate(self._schedule_of[layer].counts))
        buffers = [buffer for segments in self.segments.values() for buffer in segments.buffers()]
        buffers += self.plan.tables.values()
        tables = sum(table.numel() * table.element_size() for table in self.plan.tables.values())
        return Bytes(used + tables, sum(buffer.numel() * buffer.element_size() for buffer in buffers))

    def _current(self) -> Step:
        if self.step is None:
            raise RuntimeError("no step: call begin before append, attend and commit")
        return self.step
