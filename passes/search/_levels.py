"""Makes the stored forms of weights that a search chooses among, each once: what was made is found on disk again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from ...ir.encoding import NM, Affine, Dense, Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from .._finished import Finished
from .._walk import Walk
from ..base import Samples
from ..prune._masks import Pattern, compensated
from ..weights._gptq import solve
from ..weights._matrices import Matrix, matrices, siblings
from ..weights._moments import moments
from ..weights._range import encode

Solver = Literal["nearest", "gptq"]
DAMP = 0.01  # of GPTQ, its authors' default


def choices(program: Program, encodings: Sequence[Encoding], vocabulary: bool) -> dict[str, list[Encoding] | str]:
    """For each weight the encodings that it takes, or why it has no choice."""
    found: dict[str, list[Encoding] | str] = {}
    for name, matrix in matrices(program).items():
        if isinstance(matrix, str):
            found[name] = matrix
        elif matrix.vocabulary and not vocabulary:
            found[name] = "a vocabulary matrix, and vocabulary is false"
        else:
            shape = program.weights[name].shape
            refused = {encoding: why for encoding in encodings if (why := encoding.refuses(shape))}
            taken = [encoding for encoding in encodings if encoding not in refused]
            found[name] = taken or "; ".join(f"{encoding}: {why}" for encoding, why in refused.items())
    return found


def made(
    program: Program, asked: dict[str, list[Encoding]], solver: Solver, samples: Samples, finished: Finished
) -> dict[str, list[Weight]]:
    """The levels of each weight, the smallest first.

    gptq: integer codes of products make up for their errors on what the whole model feeds them, and what N:M sparsity
    keeps for what it removes, by SparseGPT.
    """
    groups: dict[fx.Node, list[str]] = {}
    if solver == "gptq":
        found_matrices = matrices(program)
        for each in siblings(program):
            names = [name for name in each.names if name in asked]
            groups[each.x] = [n for n in names if isinstance(m := found_matrices[n], Matrix) and not m.vocabulary]
    solved = {name for names in groups.values() for name in names}
    ordered: list[tuple[fx.Node | None, list[str]]] = [*groups.items(), (None, [n for n in asked if n not in solved])]
    walk, found, done = Walk(program, samples), dict[str, list[Weight]](), 0
    for x, names in ordered:
        hessian: torch.Tensor | None = None
        for name in names:
            samples.progress(done, len(asked), f"levels of {name}")
            done += 1
            levels = []
            for encoding in asked[name]:
                weight = finished.get(f"{name} {encoding}")
                if weight is None:
                    if x is not None and isinstance(encoding, Affine | NM):
                        hessian = moments(walk, x) if hessian is None else hessian
                    weight = _made(name, program.weights[name], encoding, hessian)
                    finished.put(f"{name} {encoding}", weight)
                levels.append(weight)
            found[name] = sorted(levels, key=lambda weight: weight.nbytes)
    return found


def _made(name: str, weight: Weight, encoding: Encoding, hessian: torch.Tensor | None) -> Weight:
    """A weight in another encoding, solved where there is a Hessian, else each value rounded to the nearest."""
    if weight.encoding == encoding:
        return weight
    try:
        if isinstance(encoding, NM) and hessian is not None:
            return _sparse(weight, encoding, hessian)
        if not isinstance(encoding, Affine) or encoding.axis != "token":
            return weight.encoded(encoding)
        if hessian is not None:
            return Weight(weight.shape, encoding, solve(weight.dense(), hessian, encoding, "mse", False, DAMP).parts)
        return Weight(weight.shape, encoding, encode(weight.dense(), encoding, "mse"))
    except SmeltError as error:
        raise SmeltError(f"{name}: {error}") from error


def _sparse(weight: Weight, encoding: NM, hessian: torch.Tensor) -> Weight:
    """N of M neighbours by SparseGPT, rounded by GPTQ where they are kept as integers."""
    dense, _ = compensated(weight.dense(), hessian, Pattern(keep=encoding.keep, of=encoding.of), DAMP)
    if not isinstance(encoding.values, Affine):
        return Weight(weight.shape, encoding, encoding.alone(dense))
    kept = replace(encoding, values=Dense("float16"))
    columns = kept.columns(kept.alone(dense), weight.shape)
    return Weight(weight.shape, encoding, solve(dense, hessian, encoding, "mse", False, DAMP, columns).parts)
