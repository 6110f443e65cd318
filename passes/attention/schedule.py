"""Divides decode attention equally among workers (Lean Attention: Hardware-Aware Scalable Attention, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Schedule(Pass):
    """Which worker attends to which part of the cache; what is computed stays the same, to the last bit on a CPU.

    order: `stream_k` lays the chunks of all rows and KV heads end to end and gives every worker an equal run of them,
        `chunks` hands them out one by one to whoever is free.

    On a CPU `chunks` also evens out workers that run late, and `stream_k` spares the shared counter and the empty
    places of ragged batches. On a GPU the kernel is a stream-K one whatever a site says: shares are cut at tiles, as in
    the paper, and where they are cut shows in the last bits.

    Deviations, on a CPU: runs are cut at chunks of 512 tokens and not at tiles, so that bits depend neither on the
    number of workers nor on the batch; and nobody waits: whoever finishes the last chunk of a head merges them, where
    in the paper the worker of the first tile spins until the others are done.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"cache"})

    order: Literal["stream_k", "chunks"] = "stream_k"

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan."""
        return cached_decoder(program)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the schedule of every site that has another."""
        assert program.cache is not None
        sites = [site for site in program.cache.sites if site.schedule != self.order]
        for site in sites:
            program.cache = program.cache.with_site(replace(site, schedule=self.order))
        if sites:
            program.touch("cache")
        same = [site for site in program.cache.sites if site.layer not in {changed.layer for changed in sites}]
        skipped = {f"layer {site.layer}": f"is divided by {self.order} already" for site in same}
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)
