"""Learns which weights to leave out for a kind of text, and changes none (Zhao et al., 2020, arXiv 2004.12406)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.blocks import blocks
from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Outcome, Samples
from ..weights._matrices import Matrix, matrices
from ._learned import Learned
from ._masked import SCORE, Masked, maskable, masked, scores, upon
from ._taught import Taught


@dataclass(frozen=True)
class Mask(Taught):
    """Puts zeros among frozen weights: a weight stays where its score, which is trained, is above 0.

    Masking as an Efficient Alternative to Finetuning for Pretrained Language Models: kinds of text that share a model
    so differ by one bit for each masked weight. Gradients reach scores as if they were the mask. Lookup tables, heads,
    routed experts and all vectors stay as they are. Integers keep their codes, with zeros among them; dense matrices
    are stored as a bit for each weight and the values that are left, where that takes less, else with zeros. Of a
    program with a base, what is the base's stands upon it: an artefact holds the masks' bits alone.

    removed: share of the weights whose scores begin below 0, drawn at random as in the paper.
    skip: layers from the bottom that are left whole.
    """

    text: float = 1.0
    rate: float = 3e-2
    removed: float = 0.05
    skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.removed < 1:
            raise SmeltError(f"removed is a share of at least 0 and below 1, not {self.removed}")
        if self.skip < 0:
            raise SmeltError(f"skip is a number of layers, not {self.skip}")

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, and leave out what the masks do."""
        plan = self._plan(program)
        skipped = {name: why for name, why in plan.items() if isinstance(why, str)}
        if len(skipped) == len(plan):
            return Outcome((), skipped)
        learned, made = Learned.of(program, ()), {}
        chance = torch.Generator().manual_seed(self.seed)
        for name in plan:
            if name not in skipped:
                made[name] = self._masked(program.weights[name], chance)
                learned.weights[name] = learned.part.weights[name] = made[name]
                learned.leaves[f"{name}/{SCORE}"] = made[name].parts[SCORE]
        if program.base is not None and not any(upon(program.base, name, program.weights[name], None) for name in made):
            raise SmeltError(
                f"tune.mask: no matrix of {program.name} is one of {program.base.name}: "
                "give the model itself as base, or none"
            )
        whole = self.whole(learned, samples, "tune.mask")
        assert samples is not None
        notes = self.taught(whole, whole, program, samples)
        masks = {name: weight.mask for name, weight in made.items()}
        count, zeros = sum(mask.numel() for mask in masks.values()), sum(int((~m).sum()) for m in masks.values())
        found: dict[str, object] = {"bytes": count // 8, "removed": round(zeros / count, 4)}
        shared: dict[str, Weight] = {}
        if program.base is not None:
            stands = {name: upon(program.base, name, w, masks.get(name)) for name, w in program.weights.items()}
            shared = {name: weight for name, weight in stands.items() if weight is not None}
            found["upon_base"] = len(masks.keys() & shared.keys())
        program.weights |= {name: masked(program.weights[name], mask) for name, mask in masks.items()} | shared
        program.touch(*masks, *shared)
        return Outcome(tuple(made), skipped, {"masks": found, **notes})

    def _masked(self, weight: Weight, chance: torch.Generator) -> Masked:
        score = scores(weight.shape, self.removed, chance).requires_grad_()
        return Masked(weight.shape, Dense("float32"), {"data": weight.dense(), SCORE: score})

    def _plan(self, program: Program) -> dict[str, Matrix | str]:
        """The matrices that are masked, or why one is not."""
        order = {node: at for at, node in enumerate(program.graph.nodes)}
        ends = [(order[block.add], block.layer) for block in blocks(program)]
        found: dict[str, Matrix | str] = {}
        for name, matrix in matrices(program).items():
            found[name] = matrix
            if isinstance(matrix, str):
                continue
            layer = next((layer for end, layer in ends if order[matrix.readers[0]] < end), len(ends))
            if matrix.vocabulary:
                found[name] = "a vocabulary matrix"
            elif any(is_op(reader, EXPERTS) for reader in matrix.readers):
                found[name] = "of routed experts, each of which sees little text"
            elif layer < self.skip:
                found[name] = f"of layer {layer}, below those that are masked"
            elif reason := maskable(program.weights[name]):
                found[name] = reason
        return found
