"""The frame of passes that fit one encoding to every matrix by sample text, and who solves for which encoding."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.encoding import Affine, Encoding
from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Calibration, Effect, Outcome, Pass, Samples
from . import _books, _gptq
from ._gptq import Solved
from ._in_order import finite, in_order, told
from ._matrices import all_dense, matrices

HEAD = Affine(8, 64)


@dataclass(frozen=True)
class Coded(Pass):
    """Encodes products in the order in which they run, each on what those before it leave of the sample text.

    damp: share of the mean second moment of the inputs that is added to each; raised, and reported, where the moments
        are singular.
    head: width of the vocabulary matrices, which are the head and every lookup table: `same` as the others, `keep`
        leaves them as they are.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})
    sparse: ClassVar[bool] = False  # whether it encodes what N:M sparsity keeps

    damp: float = 0.01
    head: Literal["keep", 8, "same"] = 8

    @property
    def calibration(self) -> Calibration:
        """Text whose second moments weigh errors."""
        return "inputs"

    @property
    def unattended(self) -> float | None:
        """What a token counts that gets no attention; None where all count alike."""
        return None

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        if not 0 <= self.damp < math.inf:
            raise SmeltError(f"damp is a share of the mean second moment, but is {self.damp}")

    @abstractmethod
    def stored(self, weight: Weight, vocabulary: bool) -> Encoding | str:
        """What a matrix is stored in, or why not; `vocabulary`: it is one whose width `head` gives."""

    @abstractmethod
    def solved(self, weight: Weight, hessian: torch.Tensor, encoding: Encoding) -> Solved:
        """A matrix [N, K] in it, for inputs with the second moments float64 [K, K]."""

    def rounded(self, weight: Weight, encoding: Encoding) -> Weight:
        """A table that only lookups read in it."""
        return weight.encoded(encoding)

    def requires(self, program: Program) -> Iterator[str]:
        """Every matrix that would be encoded must still be dense."""
        names = [name for name, how in self._plan(program).items() if not isinstance(how, str)]
        yield from all_dense(program, names, sparse=self.sparse)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Solve matrix by matrix; what a run that was broken off has finished is taken up."""
        if samples is None:
            name = type(self).__name__.lower()
            raise SmeltError(f"weights.{name} needs sample texts: pass calibration texts to compile")
        plan = self._plan(program)
        skipped = {name: how for name, how in plan.items() if isinstance(how, str)}
        encodings = {name: how for name, how in plan.items() if not isinstance(how, str)}
        sites = in_order(program, self, samples, encodings, self.solved, self.damp, self.unattended)
        for name in encodings.keys() - sites.keys():  # tables that only lookups read
            finite(name, program.weights[name])
            program.weights[name], sites[name] = self.rounded(program.weights[name], encodings[name]), {}
        program.touch(*sites)
        return Outcome(tuple(sites), skipped, told(program, sites, samples))

    def _plan(self, program: Program) -> dict[str, Encoding | str]:
        """The encoding of each matrix, or why it stays as it is."""
        found: dict[str, Encoding | str] = {}
        for name, matrix in matrices(program).items():
            if isinstance(matrix, str):
                found[name] = matrix
            elif any(is_op(reader, EXPERTS) for reader in matrix.readers):
                found[name] = "of routed experts, each of which sees little text: weights.quantize rounds them"
            elif matrix.vocabulary and self.head == "keep":
                found[name] = "a vocabulary matrix, and head is keep"
            else:
                found[name] = self.stored(program.weights[name], matrix.vocabulary and self.head == 8)
        return found


@dataclass(frozen=True)
class Fitted(Coded):
    """Encodes all matrices in one encoding with tables or factors, which are fitted in turn with the codes.

    rounds: how often they are, at most.
    """

    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise SmeltError(f"rounds is a count, but is {self.rounds}")

    @property
    @abstractmethod
    def encoding(self) -> Encoding:
        """What matrices are stored in."""

    @abstractmethod
    def solve(self, weight: torch.Tensor, hessian: torch.Tensor) -> Solved:
        """A matrix float32 [N, K] in it, for inputs with the second moments float64 [K, K]."""

    def stored(self, weight: Weight, vocabulary: bool) -> Encoding | str:
        """One encoding for all, and integers with a scale for 64 weights in the head."""
        encoding = HEAD if vocabulary else self.encoding
        return encoding.refuses(weight.shape) or encoding

    def solved(self, weight: Weight, hessian: torch.Tensor, encoding: Encoding) -> Solved:
        """Fitted, or by GPTQ."""
        dense = weight.dense()
        return self.solve(dense, hessian) if encoding == self.encoding else coded(dense, hessian, encoding, self.damp)


def coded(weight: torch.Tensor, hessian: torch.Tensor, encoding: Encoding, damp: float, rounds: int = 0) -> Solved:
    """A matrix in integers, by GPTQ, or in shared codebooks or a sum of some, in so many rounds."""
    if isinstance(encoding, Affine):
        return _gptq.solve(weight, hessian, encoding, "mse", True, damp)
    return _books.solve(weight, hessian, encoding, damp, rounds)
