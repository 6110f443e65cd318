"""A session: one cache and the bound plans that read and write it. Prefill, step, commit; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..codegen.choose import Chooser
from ..codegen.plan import Plan
from ..ir.blocks import attended
from ..ir.cache import Cache
from ..ir.cache.chunks import readings
from ..ir.depth import DepthPlan
from ..ir.errors import SmeltError
from .bound import Bound, binding
from .trees import padded

CHUNK = 512  # tokens of a prompt that are read at once
LOGITS = 1 << 26  # most logits of a chunk (256 MiB); large batches and vocabularies read fewer tokens at once
HELD = 1 << 25  # bytes of buffers that a binding for prompts may keep until the next one
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # pieces of a prompt are padded to these: few bindings are made

Harvest = Callable[[int, torch.Tensor, torch.Tensor], None]
Watch = Callable[[int, Mapping[str, torch.Tensor]], None]


class Draw(NamedTuple):
    """A choice that kernels make: greedy at temperature 0, else with noise keyed by `seed` and `requests` int64 [B]."""

    seed: int
    temperature: float
    requests: torch.Tensor


class Session:
    """Runs a decoder's plan over a cache of `batch` rows that hold at most `capacity` tokens each."""

    def __init__(
        self,
        plan: Plan,
        batch: int,
        capacity: int,
        decoded: dict[str, torch.Tensor] | None = None,
        nodes: int | None = None,
    ) -> None:
        """`decoded`: small tables, shared between sessions of one plan. `nodes`: of a step, if not the plan says so."""
        if plan.program.cache is None:
            raise SmeltError(f"{plan.program.name} has no cache, so it cannot generate: add the step cache.insert")
        if nodes is None:
            nodes = padded(1 + plan.program.decode.draft.most) if plan.program.decode else 1
        for site in plan.program.cache.sites:
            if site.hyper is not None and nodes > site.hyper.min_seq_len:
                raise SmeltError(
                    f"layer {site.layer} approximates more than {site.hyper.min_seq_len} tokens at once, and a step "
                    f"has {nodes} drafted ones: raise attention.hyper's min_seq_len, or draft fewer nodes"
                )
        self.plan = plan
        self.cache = Cache(plan.program.cache, batch, capacity, plan.device, scratch=nodes)
        self._decoded = {} if decoded is None else decoded
        self._bound: dict[tuple[int, bool, int], Bound] = {}
        self._prompts: list[int] | None = None  # tokens that each row was given, once they are read
        self._resting = [attended(plan.program) - attended(stage.program) for stage in plan.stages]
        self.chosen: torch.Tensor | None = None
        self._all: dict[int, torch.Tensor] = {}  # `valid` of a step without padding, by tokens

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        harvest: Harvest | None = None,
        end: bool = True,
        watch: Watch | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read one prompt a row, behind what the cache holds; returns the outputs at every row's last token, [B, ...].

        `end`: nothing more of the prompts comes, so that the cache stores them as its plan says. Where that says so, a
        prompt is read in chunks with the question behind each (`ir/cache/chunks.py`), and the cache holds no more of it
        than what it keeps of the chunks so far, one chunk, and the question.

        `harvest(row, tokens, logits)` sees every prompt token with the logits behind it, as prompts are read; without
        it only the last token's logits are computed. It sees none where prompts are read whole (`attention.hyper`) and
        their logits would take too much: a drafter must not decide whether a prompt is approximated.

        `watch(row, outputs)` sees the other outputs [n, ...] at every prompt token, in order.
        """
        last: dict[str, torch.Tensor] = {}
        self._prompts = None
        if self.cache.resting:
            raise SmeltError(
                "blocks were left out of tokens in the cache, which a prompt behind them cannot attend to: restart the "
                "cache and read all text as one prompt, or compile without the step that leaves them out"
            )
        if not self.cache.prefilling:
            self._read_whole(prompts, last, harvest, watch)
        elif end:
            for texts, questions in readings(self.cache.plan, prompts):
                first = harvest and _first(harvest, texts, questions), watch and _first_seen(watch, texts, questions)
                self._read_whole(texts, last, *first)
                self.cache.end_chunk(questions)
        elif self.cache.plan.chunk is None:
            self._read_whole(prompts, last, harvest, watch)
        else:
            raise SmeltError(
                "the cache is read in chunks with the question behind each, so all of a prompt must be there: read it "
                "as one piece, or set chunk of cache.select to null"
            )
        self._bound = {key: b for key, b in self._bound.items() if key[0] == 1 or b.nbytes <= HELD}
        if end:
            self.cache.end_prefill()
            self._prompts = list(self.cache.lengths)
        return last

    def _read_whole(
        self,
        prompts: Sequence[Sequence[int]],
        last: dict[str, torch.Tensor],
        harvest: Harvest | None,
        watch: Watch | None,
    ) -> None:
        """Read and commit these tokens of every row, in as few pieces as memory allows; `last` as `prefill` returns."""
        vocabulary = int(self.plan.program.facts.get("vocabulary") or 1)
        exact = [site.hyper.min_seq_len for site in self.cache.plan.sites if site.hyper is not None]
        longest, rows = max(map(len, prompts)), len(prompts)
        whole = bool(exact) and self.cache.empty and longest > 0
        if whole and longest * rows * vocabulary > LOGITS:
            harvest = None
        tokens = LOGITS // (rows * (vocabulary if harvest else 1))
        # sites that approximate long prompts want them whole, and read shorter pieces exactly
        chunk = longest if whole else max(width for width in WIDTHS if width <= max(1, min([tokens, *exact])))
        for start in range(0, max(map(len, prompts)), chunk):
            pieces = [prompt[start : start + chunk] for prompt in prompts]
            most = max(map(len, pieces))
            width = next((width for width in WIDTHS if width >= most), -(-most // CHUNK) * CHUNK)
            self._read(pieces, width, last, harvest, watch)

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        ancestors: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        draw: Draw | None = None,
        more: Mapping[str, torch.Tensor] | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Evaluate new tokens [B, T] against the cache; commit or drop them afterwards through `cache.commit`.

        Arguments as in `Cache.begin`. `more`: inputs [B, T, …] beside tokens and positions, where the program has such.
        `last` int64 [B]: the one token of each row whose logits are asked for; they are
        [B, 1, V] then. With `draw` the tokens chosen behind all new ones are in `chosen`, if the plan has a kernel that
        chooses. The results are buffers of the session: they hold until the next step, and those of another device
        come over when they are read.
        """
        new = tokens.shape[1]
        if valid is None:
            if new not in self._all:
                self._all[new] = torch.ones(tokens.shape, dtype=torch.bool)
            valid = self._all[new]
        bound = self.bound(new, last is not None, self._stage())
        if bound.last is not None and last is not None:
            bound.last.copy_(last)
        bound.inputs["tokens"].copy_(tokens)
        positions = bound.inputs["positions"].copy_(positions)  # where kernels found them in the last step
        self.cache.begin(positions, valid, ancestors, tokens=tokens)
        for name, value in (more or {}).items():
            bound.inputs[name].copy_(value)
        self.chosen = None
        if bound.chooser is None or draw is None:
            bound.run()
            return bound.outputs
        bound.chooser.start(*draw, logits=True)
        try:
            bound.run()
        finally:
            bound.chooser.stop()
        self.chosen = bound.chooser.chosen
        return bound.outputs

    def chain(
        self, tokens: Sequence[int], running: Sequence[bool], steps: int, draw: Draw, watch: Watch | None = None
    ) -> Generator[list[int], None, None]:
        """Steps of one token a row, each on what the last one chose; yields the choices, -1 where no score was finite.

        Rows that are not `running` stand still. At most `steps`, which `cache.room` must allow, and none beyond a stage
        of the depth plan; what was yielded is committed when the iterator ends or is closed. Needs a plan whose kernels
        choose: see `chains`. `watch`: as in `prefill`.
        """
        bound = self.bound(1, stage=self._stage())
        if self._depth is not None:
            steps = min(steps, self._depth.left(self._generated) or steps)
        assert isinstance(bound.chooser, Chooser)
        rows = [row for row, runs in enumerate(running) if runs]
        bound.inputs["tokens"].copy_(torch.tensor(tokens)[:, None])
        bound.inputs["positions"].copy_((torch.tensor(self.cache.lengths) * torch.tensor(running))[:, None])
        self.cache.begin(bound.inputs["positions"], torch.tensor(running)[:, None], room=steps)
        bound.chooser.start(*draw, logits=False)
        bound.chooser.move(running, self.cache.tables)
        done = 0
        try:
            bound.run()
            while True:
                done += 1
                if watch is not None:
                    for row in rows:
                        watch(row, {name: value[row] for name, value in bound.outputs.items() if name != "logits"})
                yield bound.chooser.chosen[:, 0].tolist()
                if done == steps:
                    return
                bound.again()
        finally:
            bound.chooser.stop()
            self.cache.advance(done, rows)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the cache; one that is named twice is copied, one that is not named is dropped."""
        before = self.cache.batch
        self.cache.select_rows(rows)
        if self._prompts is not None:
            self._prompts = [self._prompts[row] for row in rows]
        if self.cache.batch != before:
            self._bound.clear()
            self._all.clear()

    @property
    def chains(self) -> bool:
        """Whether the kernels of a step of one token choose the next one and move on; those of target triton do not."""
        bound = self.bound(1)
        return isinstance(bound.chooser, Chooser) and bound.alone

    def bound(self, tokens: int, last: bool = False, stage: int = 0) -> Bound:
        """The binding of steps of so many new tokens a row; `last`: of which one a row has logits.

        `stage`: of the depth plan, counted from 1; 0 for the whole model.
        """
        key = tokens, last, stage
        if key not in self._bound:
            shape = self.cache.batch, tokens
            placeholders = self.plan.program.graph.find_nodes(op="placeholder")
            inputs = {
                str(node.target): torch.zeros(*shape, *node.meta["shape"][2:], dtype=node.meta["dtype"])
                for node in placeholders
            }
            picked = torch.zeros(self.cache.batch, dtype=torch.int64) if last else None
            plan = self.plan.stages[stage - 1] if stage else self.plan
            self._bound[key] = binding(plan)(plan, inputs, self.cache, self._decoded, picked)
        return self._bound[key]

    @property
    def _depth(self) -> DepthPlan | None:
        """What steps leave out from now on; prompts run the whole model."""
        return self.plan.program.depth if self._prompts is not None else None

    @property
    def _generated(self) -> int:
        """The number of the next generated token; rows that have ended stand behind."""
        pairs = zip(self.cache.lengths, self._prompts or self.cache.lengths, strict=True)
        return max(length - prompt for length, prompt in pairs)

    def _stage(self) -> int:
        """The stage of the next step; layers that none reads any more come to rest."""
        stage = self._depth.at(self._generated) if self._depth is not None else 0
        if stage:
            self.cache.rest(self._resting[stage - 1])
        return stage

    def _read(
        self,
        pieces: Sequence[Sequence[int]],
        width: int,
        last: dict[str, torch.Tensor],
        harvest: Harvest | None,
        watch: Watch | None,
    ) -> None:
        """Read and commit one piece a row, padded to `width`; rows whose prompt is at its end give an empty one."""
        tokens = torch.zeros(len(pieces), width, dtype=torch.int64)
        valid = torch.zeros(len(pieces), width, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = torch.as_tensor(piece, dtype=torch.int64)
            valid[row, : len(piece)] = True
        positions = (torch.tensor(self.cache.lengths)[:, None] + torch.arange(width)) * valid
        ends = torch.tensor([max(0, len(piece) - 1) for piece in pieces])
        outputs = self.step(tokens, positions, valid, last=ends if harvest is None and width > 1 else None)
        for row, piece in enumerate(pieces):
            if not len(piece):
                continue
            for name, value in outputs.items():
                if name not in last:
                    last[name] = value.new_zeros(len(pieces), *value.shape[2:])
                last[name][row] = value[row, min(len(piece), value.shape[1]) - 1]
            if harvest is not None:
                harvest(row, tokens[row, : len(piece)], outputs["logits"][row, : len(piece)])
            if watch is not None:
                watch(row, {name: outputs[name][row, : len(piece)] for name in outputs if name != "logits"})
        self.cache.commit([list(range(len(piece))) for piece in pieces])


def _first(harvest: Harvest, texts: Sequence[Sequence[int]], questions: Sequence[int]) -> Harvest:
    """A harvest of each row's text but the question at its end, which is read again."""
    front = _front(texts, questions)

    def told(row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        if count := front(row, len(tokens)):
            harvest(row, tokens[:count], logits[:count])

    return told


def _first_seen(watch: Watch, texts: Sequence[Sequence[int]], questions: Sequence[int]) -> Watch:
    """A watch over the same."""
    front = _front(texts, questions)

    def told(row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        if count := front(row, len(next(iter(outputs.values()), ()))):
            watch(row, {name: value[:count] for name, value in outputs.items()})

    return told


def _front(texts: Sequence[Sequence[int]], questions: Sequence[int]) -> Callable[[int, int], int]:
    """How many of a row's next tokens stand in front of its question; asked in order."""
    left = [len(text) - question for text, question in zip(texts, questions, strict=True)]

    def front(row: int, tokens: int) -> int:
        count = min(tokens, left[row])
        left[row] -= count
        return count

    return front
