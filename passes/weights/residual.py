"""A fine-tuned model as what it adds to its base: thin products in few bits (Efficient Residual Encoding, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.encoding import Affine, Dense, LowRank, Sum
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Upon, Weight
from ..base import Effect, Outcome, Pass, Samples
from ._matrices import Matrix, matrices


@dataclass(frozen=True)
class Residual(Pass):
    """Stores each matrix as the base's plus a product of low rank, and what is no matrix as it is, where it differs.

    Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals (Ryu et al., 2023, arXiv
    2305.18425). A direction costs the bits of its two vectors and gains its squared singular value. `ranks: budget`
    takes the directions of all matrices by gain per bit, which loses the least of all residuals together, `equal` as
    many of each matrix. Directions no longer than the rounding of the model explains are left out. Of a base in few
    bits the products repair the errors as well, for which a budget is soon spent.

    budget: bytes of all that is stored beside the base, as a share of the model's own bytes.
    bits: of the singular vectors: 4 (8 for those of odd length) or 8 with a scale for each vector, or float16.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    budget: float = 0.05
    bits: Literal[4, 8, 16] = 4
    ranks: Literal["budget", "equal"] = "budget"

    def __post_init__(self) -> None:
        """Refuses options that no model can satisfy."""
        if not 0 < self.budget <= 1:
            raise SmeltError(f"budget is a share of the model's bytes above 0 and at most 1, but is {self.budget}")

    def requires(self, program: Program) -> Iterator[str]:
        """A base; matrices that stand upon nothing yet."""
        if program.base is None:
            yield f"{program.name} needs the model that it was fine-tuned from: give it with base= or --base"
        upon = [name for name, weight in program.weights.items() if isinstance(weight.parts, Upon)]
        if upon:
            yield f"{upon[0]} must stand by itself, but stands upon a base already{program.changed_by(upon[0])}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Put every weight that the base has upon it."""
        assert program.base is not None
        whole, found = 8 * program.nbytes, matrices(program)
        skipped: dict[str, str] = {}
        thin: dict[str, _Directions] = {}
        for name, weight in list(program.weights.items()):
            base = program.base.weights.get(name)
            if base is None or base.shape != weight.shape:
                skipped[name] = "the base has no weight of this name and shape, so all of it is stored"
            elif torch.equal(base.dense(), weight.dense()):
                program.weights[name] = Weight(base.shape, base.encoding, Upon(name, base, {}))
            elif isinstance(matrix := found.get(name), Matrix):
                thin[name] = _Directions.of(weight, base, self._factors(weight.shape))
            else:
                skipped[name] = f"{matrix}: all of it is stored"
        beside = sum(weight.bits for name, weight in program.weights.items() if name not in thin)
        if beside > self.budget * whole:
            raise SmeltError(
                f"what is stored as it is takes {beside / whole:.2%} of the model, and budget is {self.budget:.2%}"
            )
        ranks = self._ranks(thin, int(self.budget * whole) - beside)
        for name, rank in ranks.items():
            program.weights[name] = _upon(name, program.weights[name], program.base.weights[name], thin[name], rank)
        lost = sum(float(each.gains[ranks[name] :].sum()) for name, each in thin.items())
        total = sum(float(each.gains.sum()) for each in thin.values())
        notes = {
            "share_of_model": round(8 * program.nbytes / whole, 5),
            "share_of_residual": round(1 - lost / max(total, 1e-300), 4),
            "ranks": ranks,
        }
        program.touch(*(name for name in program.weights if name not in skipped))
        return Outcome(tuple(name for name in program.weights if name not in skipped), skipped, notes)

    def _factors(self, shape: tuple[int, ...]) -> Affine | None:
        """What stores the singular vectors of a matrix."""
        if self.bits == 16:
            return None
        tried = Affine(self.bits, 0)
        return Affine(8, 0) if LowRank(1, factors=tried).refuses(shape) else tried

    def _ranks(self, thin: dict[str, _Directions], room: int) -> dict[str, int]:
        """How many directions of each matrix are stored in so many bits."""
        ranks = dict.fromkeys(thin, 0)
        if self.ranks == "equal":
            most = max((each.count for each in thin.values()), default=0)
            for rank in range(1, most + 1):
                tried = {name: min(rank, each.count) for name, each in thin.items()}
                if sum(thin[name].cost * count for name, count in tried.items()) > room:
                    break
                ranks = tried
            return ranks
        gains = [(float(gain) / each.cost, name) for name, each in thin.items() for gain in each.gains[: each.count]]
        for _, name in sorted(gains, reverse=True):  # of one matrix they come in order, and cost the same
            if thin[name].cost <= room:
                ranks[name], room = ranks[name] + 1, room - thin[name].cost
        return ranks


@dataclass(frozen=True)
class _Directions:
    """Singular directions of a residual: gains [n], what each takes off the squared error, and bits that each costs.

    right: [..., n, K], each as long as the root of its singular value, so that both vectors of a product are of a size.
    count: directions that say more than the rounding of the model does. factors: what stores them.
    """

    right: torch.Tensor
    gains: torch.Tensor
    cost: int
    count: int
    factors: Affine | None

    @classmethod
    def of(cls, weight: Weight, base: Weight, factors: Affine | None) -> _Directions:
        """Of a weight [..., N, K] upon a base."""
        value = weight.dense()
        _, sizes, right = torch.linalg.svd(value - base.dense(), full_matrices=False)
        gains = sizes.square().flatten(0, -2).sum(0) if sizes.dim() > 1 else sizes.square()
        eps = torch.finfo(weight.encoding.torch_dtype).eps if isinstance(weight.encoding, Dense) else 0.0
        noise = eps**2 / 12 * float(value.square().mean()) * value.shape[:-2].numel()  # a variance, of all matrices
        floor = noise * (value.shape[-2] ** 0.5 + value.shape[-1] ** 0.5) ** 2  # the longest direction of such noise
        count = int((gains > max(floor, 1e-12 * float(gains[0]))).sum())
        cost = int(LowRank(1, factors=factors).stored_bits(weight.shape))
        return cls(right * sizes.sqrt()[..., None], gains, cost, count, factors)


def _upon(name: str, weight: Weight, base: Weight, thin: _Directions, rank: int) -> Weight:
    """A weight as its base and so many directions."""
    if not rank:
        return Weight(base.shape, base.encoding, Upon(name, base, {}))
    encoding = LowRank(rank, factors=thin.factors)
    parts = encoding.onto(weight.dense() - base.dense(), thin.right[..., :rank, :])
    own = {f"b_{part}": value for part, value in parts.items()}
    return Weight(weight.shape, Sum((base.encoding, encoding)), Upon(name, base, own))
