"""Zeros in weight matrices, chosen on sample text (SparseGPT, Frantar and Alistarh, 2023, arXiv 2301.00774)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch

from ...ir.encoding import NM, Bitmap, Dense, Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Calibration, Effect, Outcome, Pass, Samples
from ..weights._gptq import Solved, lost
from ..weights._in_order import finite, in_order, told
from ..weights._matrices import all_dense, matrices, siblings
from ._masks import Pattern, compensated


@dataclass(frozen=True)
class Sparsify(Pass):
    """Sets the weights of matrix products to zero that count least, and stores the others alone.

    Products are treated in the order in which they run, each on what the sparse ones before it leave of the sample
    text. Lookup tables, heads and routed experts stay as they are.

    pattern: `unstructured`, or N:M such as `2:4`, which keeps N of every M neighbours in a row. The latter stores the
        places of what is kept, so that products read no more than that, and `weights.gptq` and `weights.quantize` may
        round it; the former a bit for each weight, which is read in order, by CPUs alone.
    share: how much leaves, unstructured.
    score: `magnitude`; `wanda`, times the norm of its input (Sun et al., 2023, arXiv 2306.11695); `sparsegpt`, the
        error that is left once all later weights of the row have made up for it, as they then do.
    match: names of weights that are pruned, with `*` for any letters, so that parts of a model can lose other shares.
    scope: what loses the share: every `row`, or the matrix as a `whole` (by sparsegpt each 128 columns of it).
    damp: share of the mean second moment of the inputs that sparsegpt adds to each; raised, and reported, where the
        moments are singular.

    Values are stored as bfloat16 where the matrix was, else as float16.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    pattern: str = "unstructured"
    share: float = 0.5
    score: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    scope: Literal["row", "whole"] = "row"
    match: str = "*"
    damp: float = 0.01

    def __post_init__(self) -> None:
        """Refuses patterns that there are none of, and options that mean nothing."""
        if self.pattern != "unstructured":
            keep, _, of = self.pattern.partition(":")
            if not keep.isdecimal() or not of.isdecimal():
                raise SmeltError(f"pattern is unstructured, or N:M such as 2:4, but is '{self.pattern}'")
            NM(int(keep), int(of))
        if not 0 < self.share < 1:
            raise SmeltError(f"share is above 0 and below 1, but is {self.share}")
        if not 0 <= self.damp < math.inf:
            raise SmeltError(f"damp is a share of the mean second moment, but is {self.damp}")

    @property
    def calibration(self) -> Calibration:
        return "none" if self.score == "magnitude" else "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """Every matrix that would be pruned must still be dense."""
        asked = [name for name, how in self.plan(program).items() if not isinstance(how, str)]
        if not asked and not any(fnmatchcase(name, self.match) for name in program.weights):
            some = ", ".join(list(program.weights)[:5])
            yield f"a weight must match '{self.match}', but none does; they are {some}, …"
        yield from all_dense(program, asked)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Prune the products of one tensor after the other; a run that was broken off is taken up."""
        if samples is None and self.calibration != "none":
            raise SmeltError(f"prune.sparsify by {self.score} needs sample texts: pass calibration texts to compile")
        plan = self.plan(program)
        asked = {name: how for name, how in plan.items() if not isinstance(how, str)}
        sites: dict[str, dict[str, Any]] = {}
        if samples is not None and self.calibration != "none":
            sites = in_order(program, self, samples, asked, self._solved, self.damp)
        else:
            for name, encoding in asked.items():
                weight = program.weights[name]
                sparse = self._without(finite(name, weight), 1.0)
                program.weights[name], sites[name] = Weight(weight.shape, *_stored(encoding, sparse)), {}
        program.touch(*sites)
        skipped = {name: why for name, why in plan.items() if isinstance(why, str)}
        return Outcome(tuple(sites), skipped, told(program, sites, samples))

    def _solved(self, weight: Weight, hessian: torch.Tensor, encoding: Encoding) -> Solved:
        assert isinstance(encoding, NM | Bitmap)
        dense, damp = weight.dense(), self.damp
        if self.score == "sparsegpt":
            sparse, damp = compensated(dense, hessian, self._of, damp)
        else:
            sparse = self._without(dense, hessian.diagonal().sqrt().float())
        made, parts = _stored(encoding, sparse)
        return Solved(parts, damp, lost(dense, made.decode(parts, weight.shape), hessian), made)

    def _without(self, dense: torch.Tensor, norms: torch.Tensor | float) -> torch.Tensor:
        return dense.masked_fill(self._of.removed(dense.abs() * norms), 0.0)

    @property
    def _of(self) -> Pattern:
        if self.pattern == "unstructured":
            return Pattern(self.share, self.scope == "row")
        keep, of = map(int, self.pattern.split(":"))
        return Pattern(keep=keep, of=of)

    def _encoding(self, weight: Weight) -> NM | Bitmap:
        dense = weight.encoding
        dtype = "bfloat16" if isinstance(dense, Dense) and dense.dtype == "bfloat16" else "float16"
        return NM(self._of.keep, self._of.of, Dense(dtype)) if self._of.of else Bitmap(dtype)

    def plan(self, program: Program) -> dict[str, NM | Bitmap | str]:
        """The encoding of each matrix that is pruned, or why it stays as it is."""
        products = {name for each in siblings(program) for name in each.names}
        found: dict[str, NM | Bitmap | str] = {}
        for name, matrix in matrices(program).items():
            if isinstance(matrix, str):
                found[name] = matrix
            elif not fnmatchcase(name, self.match):
                found[name] = f"its name does not match '{self.match}'"
            elif matrix.vocabulary:
                found[name] = "a vocabulary matrix"
            elif name not in products:
                found[name] = "of routed experts, each of which sees little text"
            else:
                encoding = self._encoding(program.weights[name])
                found[name] = encoding.refuses(program.weights[name].shape) or encoding
        return found


def _stored(encoding: NM | Bitmap, sparse: torch.Tensor) -> tuple[NM | Bitmap, dict[str, torch.Tensor]]:
    """The encoding of a sparse matrix, and its parts."""
    return encoding.coded(sparse) if isinstance(encoding, Bitmap) else (encoding, encoding.alone(sparse))
