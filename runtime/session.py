"""A session: one cache and the bound plans that read and write it. Prefill, step, commit; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..codegen.plan import BULK, Plan
from ..ir.cache import Cache
from ..ir.errors import SmeltError
from .bound import Bound

CHUNK = 4 * BULK  # tokens of a prompt that are read at once
LOGITS = 1 << 26  # most logits of a chunk (256 MiB); large batches and vocabularies read fewer tokens at once
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)  # the rest of a prompt is padded to these, so that few bindings are made

Harvest = Callable[[int, torch.Tensor, torch.Tensor], None]


class Session:
    """Runs a decoder's plan over a cache of `batch` rows that hold at most `capacity` tokens each."""

    def __init__(self, plan: Plan, batch: int, capacity: int, decoded: dict[str, torch.Tensor] | None = None) -> None:
        """`decoded`: small tables, shared between sessions of one plan."""
        if plan.program.cache is None:
            raise SmeltError(f"{plan.program.name} has no cache, so it cannot generate: add the step cache.insert")
        nodes = len(plan.program.decode.tree) if plan.program.decode else 1
        self.plan = plan
        self.cache = Cache(plan.program.cache, batch, capacity, scratch=nodes)
        self._decoded = {} if decoded is None else decoded
        self._bound: dict[tuple[int, bool], Bound] = {}
        self._all: dict[int, torch.Tensor] = {}  # `valid` of a step without padding, by tokens

    def prefill(self, prompts: Sequence[Sequence[int]], harvest: Harvest | None = None) -> dict[str, torch.Tensor]:
        """Read one prompt a row; returns for each output the values at every row's last token, [B, ...].

        `harvest(row, tokens, logits)` sees every prompt token with the logits behind it, as prompts are read. How a
        prompt is cut depends on its own length alone, so that a row's values do not depend on the others: whole blocks
        of BULK tokens go through bulk kernels, what is left through those of a step.
        """
        vocabulary = int(self.plan.program.facts.get("vocabulary") or 1)
        chunk = max(BULK, min(CHUNK, LOGITS // (len(prompts) * vocabulary) // BULK * BULK))
        whole = [len(prompt) // BULK * BULK for prompt in prompts]
        last: dict[str, torch.Tensor] = {}
        for start in range(0, max(whole), chunk):
            pieces = [prompt[start : min(start + chunk, end)] for prompt, end in zip(prompts, whole, strict=True)]
            self._read(pieces, max(map(len, pieces)), True, last, harvest)
        pieces = [prompt[end:] for prompt, end in zip(prompts, whole, strict=True)]
        if longest := max(map(len, pieces)):
            self._read(pieces, next(width for width in WIDTHS if width >= longest), False, last, harvest)
        self._bound = {key: b for key, b in self._bound.items() if key == (1, False)}  # free a prompt's large buffers
        self.cache.end_prefill()
        return last

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        ancestors: torch.Tensor | None = None,
        bulk: bool = False,
    ) -> Mapping[str, torch.Tensor]:
        """Evaluate new tokens [B, T] against the cache; commit or drop them afterwards through `cache.commit`.

        Arguments as in `Cache.begin`; `bulk` as in `Bound`. The results are buffers of the session: they hold until the
        next step.
        """
        new = tokens.shape[1]
        if valid is None:
            if new not in self._all:
                self._all[new] = torch.ones(tokens.shape, dtype=torch.bool)
            valid = self._all[new]
        self.cache.begin(positions, valid, ancestors)
        bound = self._bound.get((new, bulk))
        if bound is None:
            inputs = {name: torch.zeros(tokens.shape, dtype=torch.int64) for name in ("tokens", "positions")}
            bound = self._bound[new, bulk] = Bound(self.plan, inputs, self.cache, self._decoded, bulk)
        bound.inputs["tokens"].copy_(tokens)
        bound.inputs["positions"].copy_(positions)
        bound.run()
        return bound.outputs

    def _read(
        self,
        pieces: Sequence[Sequence[int]],
        width: int,
        bulk: bool,
        last: dict[str, torch.Tensor],
        harvest: Harvest | None,
    ) -> None:
        """Read and commit one piece a row, padded to `width`; rows whose prompt is at its end give an empty one."""
        tokens = torch.zeros(len(pieces), width, dtype=torch.int64)
        valid = torch.zeros(len(pieces), width, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = torch.as_tensor(piece, dtype=torch.int64)
            valid[row, : len(piece)] = True
        positions = (torch.tensor(self.cache.lengths)[:, None] + torch.arange(width)) * valid
        outputs = self.step(tokens, positions, valid, bulk=bulk)
        for row, piece in enumerate(pieces):
            if not len(piece):
                continue
            for name, value in outputs.items():
                if name not in last:
                    last[name] = value.new_zeros(len(pieces), *value.shape[2:])
                last[name][row] = value[row, len(piece) - 1]
            if harvest is not None:
                harvest(row, tokens[row, : len(piece)], outputs["logits"][row, : len(piece)])
        self.cache.commit([list(range(len(piece))) for piece in pieces])
