"""The first convolutions of a net crop by crop (MCUNetV2, Lin et al., 2021, arXiv 2110.15352)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.shapes import derive
from ..base import Exactness, Outcome, Pass, Samples
from ._stem import Stem, run_by_crops, stem


@dataclass(frozen=True)
class Crops(Pass):
    """Runs the first convolutions on one crop of the picture after the other, so that no large feature map is held.

    Windows at the edge of a crop reach into its neighbours, and are computed by both. Batch norms must have gone into
    the convolutions (`weights.fold`), which must still be such (before `weights.unfold`).

    grid: crops a side.
    convolutions: how many of the first convolutions run so.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT

    grid: int = 2
    convolutions: int = 3

    def __post_init__(self) -> None:
        if self.grid < 2 or self.convolutions < 1:
            raise SmeltError(f"grid is 2 or more and convolutions 1, but are {self.grid} and {self.convolutions}")

    def requires(self, program: Program) -> Iterator[str]:
        """Convolutions that follow one another."""
        yield from croppable(program, self.convolutions, self.grid)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Put the crops in the place of the whole."""
        found = stem(program, self.convolutions)
        assert isinstance(found, Stem)
        notes = {"multiplications": told(found, self.grid)}
        done = tuple(node.name for node in found.convolutions)
        run_by_crops(program, found, self.grid)
        derive(program)
        return Outcome(done, {}, notes)


def croppable(program: Program, convolutions: int, grid: int) -> Iterator[str]:
    """The contract of passes that run a stem by crops."""
    derive(program)
    found = stem(program, convolutions)
    if isinstance(found, str):
        yield found
    elif min(found.nodes[-1].meta["shape"][2:]) < grid:
        last = found.nodes[-1]
        yield f"{last.name} must have {grid} rows and columns at least, but is {last.meta['shape']}"


def told(found: Stem, grid: int) -> dict[str, int]:
    """Multiplications a picture, as a whole and by crops."""
    return {"whole": sum(sum(c.macs) for c in found.crops(1)), "crops": sum(sum(c.macs) for c in found.crops(grid))}
