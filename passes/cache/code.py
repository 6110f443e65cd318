"""Lets a prompt's cache be stored and sent as a bitstream at several qualities (CacheGen: KV Cache Compression and
Streaming for Fast Large Language Model Serving, 2023, arXiv:2310.07240)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

from ...ir.cache.code import LEVELS, Level
from ...ir.cache.code import Code as Coding
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import changed


@dataclass(frozen=True)
class Code(Pass):
    """Says how `Prefix.save` codes the cache of a prompt; generation itself changes in nothing.

    levels: qualities, finest first; each has a name and steps of keys and values in spreads of their channels, one step
        or several for equal parts of the depth.
    chunk: tokens that are sent, and whose quality is chosen, together.
    sink: first tokens, which are stored as they are.
    delta: none rounds every token by itself; anchor rounds differences to the first token of each group, as in the
        paper; fitted scales that token by what each channel keeps of it.
    group: tokens that share an anchor.
    tables: most frequency tables for keys, and for values, of a level.

    Deviations: keys and values lose their channel's mean and are divided by its spread before they are rounded, so that
    deltas are off by default; channels with like statistics share a frequency table, where the paper has one for each
    channel of each layer; anchors are rounded like the others, which are rounded against the anchor as it is read, so
    that no error adds up.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"cache"})

    levels: tuple[Level, ...] = LEVELS
    chunk: int = 256
    sink: int = 4
    delta: Literal["none", "anchor", "fitted"] = "none"
    group: int = 10
    tables: int = 8

    def __post_init__(self) -> None:
        self._coding()

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan of dense sites that nothing leaves, and that is not coded yet."""
        yield from cached_decoder(program)
        for site in program.cache.sites if program.cache else ():
            if site.tail is not None:
                yield (
                    f"coded levels need all tokens as they were read, but layer {site.layer} lets them leave its tail"
                    f"{program.changed_by('cache')}: leave that step out, or this one: what a recipe without it stores "
                    "is saved lossless"
                )
                return
            if site.code is not None:
                yield f"the cache of layer {site.layer} is coded already{program.changed_by('cache')}: keep one step"
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Note the coding at every site."""
        assert program.cache is not None
        sites, coding = program.cache.sites, self._coding()
        program.cache = changed(program.cache, sites, lambda site: replace(site, code=coding))
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites))

    def _coding(self) -> Coding:
        return Coding(**{field.name: getattr(self, field.name) for field in fields(self)})
