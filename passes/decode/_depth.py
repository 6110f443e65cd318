"""What passes share that leave blocks out by a token's position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...ir.blocks import stages
from ...ir.program import Program
from .._contracts import cached_decoder


def undrafted(program: Program) -> Iterator[str]:
    """A decoder with a cache plan, all of whose tokens run the same blocks so far, each in a step of its own."""
    yield from cached_decoder(program)
    since = program.changed_by("decode")
    if program.decode is not None:
        yield (
            f"{program.name} must not draft, but decodes by {program.decode.drafter}{since}: drafted tokens of one "
            "step stand at several positions, which run different blocks; keep one of the two steps"
        )
    if program.depth is not None:
        yield f"{program.name} must run all of its blocks, but leaves some out{since}: keep one of the two steps"


def shallow(program: Program) -> dict[str, Any]:
    """Bytes of the weights that a step reads in each stage, as a share of all, by the stage's first token."""
    assert program.depth is not None
    pairs = zip(program.depth.stages, stages(program), strict=True)
    return {
        "bytes read": {
            f"from token {stage.start}": round(sum(w.nbytes for w in left.weights.values()) / program.nbytes, 3)
            for stage, left in pairs
        }
    }
