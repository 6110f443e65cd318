"""Weights as few bits plus a product of two thin matrices (ReALLM, 2024; LQ-LoRA, 2023)."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch

from ...ir.encoding import Affine, Encoding, LowRank, Sum
from ...ir.errors import SmeltError
from ._books import shared
from ._coded import Fitted, coded
from ._gptq import Solved, inverse_factor, lost


@dataclass(frozen=True)
class Factor(Fitted):
    """Stores matrices as `base` and a product of low rank, fitted in turn to what products lose on sample text.

    The product is the best of its rank for what the base misses, weighed by the second moments of the inputs; the base
    is then fitted to what the product misses (LQ-LoRA, Guo et al., 2023, arXiv 2311.12023). With a codebook as base it
    is the linear case of ReALLM (Leconte et al., 2024, arXiv 2405.13155). Factors are float16: a rank
    takes 16 (N + K) / (N K) bits a weight, which is much on small matrices.

    base: what stores the large part: affine, a shared codebook, or a sum of some.
    rank: of the product, at most.
    energy: share of the weighed square error of the base for which the least rank is taken; 1 takes `rank`.
    loops: how often base and product are fitted in turn; the best is kept.
    """

    base: Encoding = Affine(3, 128)  # noqa: RUF009  # a value, not a call that may change
    rank: int = 16
    energy: float = 1.0
    loops: int = 3

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        super().__post_init__()
        if self.loops < 1:
            raise SmeltError(f"loops is a positive number, but is {self.loops}")
        if not 0 < self.energy <= 1:
            raise SmeltError(f"energy is a share above 0 and at most 1, but is {self.energy}")
        if not isinstance(self.base, Affine) and not shared(self.base):
            raise SmeltError(f"base is affine, a shared codebook or a sum of some, but is {self.base}")
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """The base and a product of the full rank."""
        return self._of(self.rank)

    def _of(self, rank: int) -> Sum:
        return Sum((*(self.base.terms if isinstance(self.base, Sum) else (self.base,)), LowRank(rank)))

    def solve(self, weight: torch.Tensor, hessian: torch.Tensor) -> Solved:
        """Base and product in turn, from the base alone."""
        shape, best = tuple(weight.shape), None
        upper, damp = inverse_factor(hessian, self.damp)
        product = torch.zeros_like(weight)
        for _ in range(self.loops):
            base = coded(weight - product, hessian, self.base, self.damp, self.rounds)
            rest = weight - self.base.decode(base.parts, shape)
            basis = self._basis(rest, upper.double())
            encoding = self._of(len(basis))
            thin = encoding.terms[-1]
            assert isinstance(thin, LowRank)
            made = thin.onto(rest, basis, hessian)
            product = thin.decode(made, shape)
            last = string.ascii_lowercase[len(encoding.terms) - 1]
            held = base.parts if isinstance(self.base, Sum) else {f"a_{part}": v for part, v in base.parts.items()}
            held = {**held, **{f"{last}_{part}": value for part, value in made.items()}}
            error = lost(weight, encoding.decode(held, shape), hessian)
            if best is None or error < best.error:
                best = Solved(held, damp, error, encoding)
        assert best is not None
        return best

    def _basis(self, rest: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """Orthogonal directions [rank, K] of the inputs in which most of the error of the products lies."""
        # with UᵀU = H⁻¹ and E = R U⁻¹ the error is ‖E‖², and E ≈ E V Vᵀ means R ≈ (E V) (Vᵀ U)
        weighed = torch.linalg.solve_triangular(upper, rest.double(), upper=True, left=False)
        _, sizes, directions = torch.linalg.svd(weighed, full_matrices=False)
        share = sizes.square().cumsum(0) / sizes.square().sum().clamp_min(1e-300)
        rank = min(self.rank, len(sizes))
        if self.energy < 1:
            rank = min(rank, int((share < self.energy).sum()) + 1)
        found: torch.Tensor = directions[:rank] @ upper
        return torch.nn.functional.normalize(found).float()
