"""A session: one cache and the bound plans that read and write it. Prefill, step, commit; it decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..codegen.plan import Plan
from ..ir.cache import Cache
from ..ir.errors import SmeltError
from .bound import Bound

CHUNK = 512  # tokens of a prompt that are read at once
SMALL = (1, 2, 4, 8, 16, 32, 64, 128)  # prompt pieces are padded to these, so that few bindings are made


class Session:
    """Runs a decoder's plan over a cache of `batch` rows that hold at most `capacity` tokens each."""

    def __init__(self, plan: Plan, batch: int, capacity: int, decoded: dict[str, torch.Tensor] | None = None) -> None:
        """`decoded`: small tables shared between sessions of one plan."""
        if plan.program.cache is None:
            raise SmeltError(f"{plan.program.name} has no cache, so it cannot generate: add the step cache.insert")
        nodes = len(plan.program.decode.tree) if plan.program.decode else 1
        self.plan = plan
        self.cache = Cache(plan.program.cache, batch, capacity, scratch=nodes)
        self._decoded = {} if decoded is None else decoded
        self._bound: dict[int, Bound] = {}

    def prefill(
        self, prompts: Sequence[Sequence[int]], harvest: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
    ) -> dict[str, torch.Tensor]:
        """Read one prompt a row; returns for each output the values at every row's last token, [B, ...].

        `harvest(row, tokens, logits)` sees every prompt token with the logits behind it, as prompts are read.
        """
        rows, longest = len(prompts), max(map(len, prompts))
        last: dict[str, torch.Tensor] = {}
        for start in range(0, longest, CHUNK):
            pieces = [prompt[start : start + CHUNK] for prompt in prompts]
            width = next((n for n in SMALL if n >= max(map(len, pieces))), CHUNK)
            tokens = torch.zeros(rows, width, dtype=torch.int64)
            valid = torch.zeros(rows, width, dtype=torch.bool)
            for row, piece in enumerate(pieces):
                tokens[row, : len(piece)] = torch.tensor(piece, dtype=torch.int64)
                valid[row, : len(piece)] = True
            positions = (start + torch.arange(width)).expand(rows, -1) * valid
            outputs = self.step(tokens, positions, valid)
            for row, piece in enumerate(pieces):
                if not piece:
                    continue
                for name, value in outputs.items():
                    last.setdefault(name, value.new_empty(rows, *value.shape[2:]))[row] = value[row, len(piece) - 1]
                if harvest is not None:
                    harvest(row, tokens[row, : len(piece)], outputs["logits"][row, : len(piece)])
            self.cache.commit([list(range(len(piece))) for piece in pieces])
        self._bound = {n: b for n, b in self._bound.items() if n == 1}  # a prompt's buffers are large: free them
        self.cache.end_prefill()
        return last

    def step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        ancestors: torch.Tensor | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Evaluate new tokens [B, T] against the cache; commit or drop them afterwards through `cache.commit`.

        Arguments as in `Cache.begin`. The results are buffers of the session: they hold until the next step.
        """
        self.cache.begin(positions, valid, ancestors)
        bound = self._bound.get(tokens.shape[1])
        if bound is None:
            bound = self._bound[tokens.shape[1]] = self._bind(tokens.shape)
        bound.inputs["tokens"].copy_(tokens)
        bound.inputs["positions"].copy_(positions)
        bound.run()
        return bound.outputs

    def _bind(self, shape: torch.Size) -> Bound:
        inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("tokens", "positions")}
        return Bound(self.plan, inputs, self.cache, self._decoded)
