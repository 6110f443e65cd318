"""Matrix products that read the same tensor, whose weights and inputs are given a width together."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.encoding import Affine
from ...ir.program import Program
from ..weights._matrices import Matrix, Siblings, matrices, siblings


def sites(program: Program, widths: Sequence[int]) -> tuple[list[Siblings], dict[str, str]]:
    """Those whose weights can be integers of all these widths, in graph order, and by weight why others cannot."""
    known, found = matrices(program), []
    skipped = {name: why for name, why in known.items() if isinstance(why, str)}
    for each in siblings(program):
        refusals = (_refusal(program, known[name], each, name, widths) for name in each.names)
        if (why := next((why for why in refusals if why), None)) is None:
            found.append(each)
        else:
            skipped |= dict.fromkeys(each.names, why)
    left = set(known) - set(skipped) - {name for each in found for name in each.names}
    return found, skipped | dict.fromkeys(left, "a lookup, and no matrix product")


def rounded(program: Program) -> str | None:
    """Why activations must not be rounded here, or None."""
    if "activations" not in program.origin:
        return None
    return f"activations must not be rounded yet, but are{program.changed_by('activations')}"


def _refusal(program: Program, matrix: Matrix | str, of: Siblings, name: str, widths: Sequence[int]) -> str | None:
    if isinstance(matrix, str):
        return matrix
    if any(reader not in of.nodes for reader in matrix.readers):
        return "multiplied with several tensors, or looked up"
    refused = (Affine(width, 0).refuses(program.weights[name].shape) for width in widths)
    return next((why for why in refused if why), None)
