"""Trains decoding heads on text with the model frozen (Medusa-1: Simple LLM Inference Acceleration Framework, 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ...ir import decode
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only
from ..decode._join import exchange, names
from ..decode._trees import best_tree, expected_tokens
from ._drill import Drill, Score, trained

CHECKS = 4  # times that a training measures held-out loss; the weights of the lowest win
MOST_HELD = 32  # held-out windows that are used: 4 thousand places tell hit rates to half a point


@dataclass(frozen=True)
class Heads(Pass):
    """Head j learns the token j + 2 places on; the draft tree is then fitted to how often its guesses are right.

    The loss is cross-entropy, weighted by decay^j.

    steps: updates by AdamW, with a short warm-up and a cosine to zero.
    batch: windows of text in an update.
    length: tokens of a window.
    rate: largest learning rate.
    decay: weight of a head's loss relative to the head before it.
    seed: of the order of the windows.
    holdout: share of the windows that are not trained on; they decide which weights are kept, and the tree.

    Deviations: heads learn the given text, not chat transcripts of the model's own. The paper searches the tree for one
    model once; here it is best-first under this model's own held-out hit rates.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT  # of the logits: only the output `heads` changes
    effects: ClassVar[frozenset[Effect]] = frozenset({"outputs", "decode"})
    calibration: ClassVar[Literal["none", "text"]] = "text"

    steps: int = 200
    batch: int = 8
    length: int = 128
    rate: float = 1e-3
    decay: float = 0.8
    seed: int = 0
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.length) < 1:
            raise SmeltError(f"steps, batch and length count from 1, not {self.steps}, {self.batch} and {self.length}")
        if not 0 < self.holdout < 1:
            raise SmeltError(f"holdout is a share of the text between 0 and 1, not {self.holdout}")

    def requires(self, program: Program) -> Iterator[str]:
        """Untrained heads whose weights are Dense."""
        yield from decoder_only(program)
        since = program.changed_by("decode")
        if _drafting(program) is None or "heads" not in program.outputs:
            has = f"decodes by {names(program.decode)}" if program.decode else "has no drafter"
            yield f"{program.name} must decode by heads, but {has}{since}: put decode.heads in front"
            return
        if program.facts.get("heads_trained"):
            yield f"the heads of {program.name} must be untrained, but are trained{since}: train them once"
        for name in trained(program):
            encoding = program.weights[name].encoding
            if not isinstance(encoding, Dense):
                yield (
                    f"{name} must be Dense to be trained, but is {encoding}{program.changed_by(name)}: "
                    "move train.heads in front"
                )
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, store the weights in the type they had, and replace the draft tree."""
        plan, draft = program.decode, _drafting(program)
        if samples is None or plan is None or draft is None:
            raise SmeltError("train.heads needs sample texts: pass calibration texts to compile")
        drill = Drill.of(program, self.decay)
        learn, held = self._windows(samples.tokens, drill.heads)
        before = drill.measure(held, draft.width)
        updates = self._train(drill, learn, held, samples, before)
        for name, value in drill.weights.items():
            old = program.weights[name]
            program.weights[name] = replace(old, parts=old.encoding.encode(value.detach()))
            value.data.copy_(program.weights[name].dense())
        after = drill.measure(held, draft.width)
        tree = best_tree(after.hits, len(draft.tree) - 1)
        program.decode = exchange(plan, draft, replace(draft, tree=tree))
        program.facts["heads_trained"] = True
        program.touch("decode", *drill.weights)
        notes = {
            "before": before.to_dict(),
            "after": after.to_dict(),
            "kept_update": updates,
            "held_out_tokens": held.numel(),
            "expected_tokens_per_step": round(expected_tokens(after.hits, tree), 3),
            "nodes": len(tree) - 1,
        }
        return Outcome(tuple(f"heads.{j}" for j in range(drill.heads)), notes=notes)

    def _windows(self, tokens: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows [N, L] to learn from, and windows of the end of the text that are held out."""
        length = min(self.length, tokens.shape[1])
        if length < heads + 2:
            raise SmeltError(
                f"train.heads: {heads} heads guess {heads + 1} tokens on, windows of {length} are too short; "
                f"give texts (and length) of {heads + 2} tokens or more"
            )
        whole = tokens.shape[1] // length
        windows = tokens[:, : whole * length].reshape(-1, length)
        count = math.ceil(self.holdout * len(windows))
        if count >= len(windows):
            raise SmeltError(
                f"train.heads: {len(windows)} windows of {length} tokens cannot be parted into text to learn and text "
                "to check; give more text, or a smaller length"
            )
        return windows[:-count], windows[-count:][:MOST_HELD]

    def _train(self, drill: Drill, learn: torch.Tensor, held: torch.Tensor, samples: Samples, start: Score) -> int:
        """Leave the weights of the lowest held-out loss in the drill; returns after how many updates that was."""
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(drill.weights.values(), lr=self.rate, weight_decay=0.0)
        warm = max(1, self.steps // 20)
        checks = {self.steps * (i + 1) // CHECKS for i in range(CHECKS)}
        best = (start.loss, 0, {name: value.detach().clone() for name, value in drill.weights.items()})
        order = torch.empty(0, dtype=torch.int64)
        for step in range(1, self.steps + 1):
            while len(order) < self.batch:
                order = torch.cat([order, torch.randperm(len(learn), generator=generator)])
            chosen, order = order[: self.batch], order[self.batch :]
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, step / warm) * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            with torch.enable_grad():
                drill.loss(*drill.guesses(learn[chosen])).backward()
            optimizer.step()
            optimizer.zero_grad()
            samples.progress(step, self.steps, "training heads")
            if step in checks and (loss := drill.measure(held, 1).loss) < best[0]:
                best = (loss, step, {name: value.detach().clone() for name, value in drill.weights.items()})
        for name, value in drill.weights.items():
            value.data.copy_(best[2][name])
        return best[1]


def _drafting(program: Program) -> decode.Heads | None:
    """The program's drafting by heads."""
    parts = program.decode.draft.parts if program.decode else ()
    return next((part for part in parts if isinstance(part, decode.Heads)), None)
