"""Lets pieces of a context be read in parallel behind shared sinks (Attention Entropy is a Key Factor: An Analysis of
Parallel Context Encoding with Full-attention-based Pre-trained Language Models, 2024, arXiv:2412.16545)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Parallel(Pass):
    """Holds the model to what `Compiled.read` needs for a list of pieces, and says which sinks they share by default.

    sink: first tokens of the first piece that stand once, in front of all pieces, and that each of them sees.

    Deviation: the pieces' keys are turned to positions one behind the other, so that a joined context is a cache like
    any other; in the paper all pieces begin at the same position.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"cache"})

    sink: int = 4

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise SmeltError(f"sink counts tokens that all pieces share, {self.sink} is negative")

    def requires(self, program: Program) -> Iterator[str]:
        """Sites whose keys are rotated by their positions, so that they can be moved."""
        yield from cached_decoder(program)
        for site in program.cache.sites if program.cache else ():
            if site.rope is None:
                yield (
                    f"keys of layer {site.layer} must be rotated by their positions, but are not: pieces that were "
                    "read apart cannot be moved to their places"
                )
                return
        if program.cache is not None and program.cache.chunk is not None:
            yield (
                f"pieces that are read apart have no question behind them, but prompts are read in chunks that do"
                f"{program.changed_by('cache')}: set chunk of cache.select to null, or leave one of the two steps out"
            )

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Note the option; the sites are right as they are."""
        assert program.cache is not None
        program.facts["parallel"] = {"sink": self.sink}
        return Outcome(tuple(f"layer {site.layer}" for site in program.cache.sites))
