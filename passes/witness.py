"""Remembers what the first and the last good Program answer, so that each rewrite costs one replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..ir.cache import CachePlan, Site
from ..ir.program import Program
from .measure import NONE, Divergence, Outputs, compare_outputs, observe
from .probe import Probe, probe, reach
from .structure import same_computation

TOLERANCE = 1e-5  # of an exact pass: relative to the largest output, fp32


@dataclass(frozen=True)
class Answers:
    """What a Program gave to the probe (None: it was not asked yet), and how far that is from the first Program."""

    outputs: Outputs | None = None
    from_source: Divergence | None = NONE


class Witness:
    """Compares rewrites to the last good Program and to the first one. Nothing runs before the first comparison.

    A rewrite that computes the same from the same weights is not replayed. A cache that would hold nothing encoded at
    the end of the prompt asks for a longer one, and the remembered answers are taken again.
    """

    def __init__(self, source: Program, unseen: Mapping[str, torch.Tensor] | None = None) -> None:
        self._source, self._unseen = source, unseen
        self._probe: Probe | None = None
        self._reach = 0
        self._first: Outputs = {}
        self._last = Answers()
        self._next = Answers()

    def compare(self, before: Program, after: Program, reshaped: bool = False) -> Divergence | None:
        """How far `after` is from `before`, the last good Program; None if outputs are `reshaped` beyond comparison."""
        if same_computation(before, after):
            self._next = self._last
            return NONE
        if reshaped and before.facts.get("vocabulary") != after.facts.get("vocabulary"):
            self._restart(after)
            return None
        asked, last = self._asked(before, after)
        outputs = observe(after, asked)
        if reshaped and any(outputs[name].shape != value.shape for name, value in last.items()):
            self._restart(after)
            return None
        comparable = self._last.from_source is not None
        self._next = Answers(outputs, compare_outputs(self._first, outputs) if comparable else None)
        return compare_outputs(last, outputs)

    @property
    def from_source(self) -> Divergence | None:
        """How far the Program compared last is from the first one; None if that cannot be told."""
        return self._next.from_source

    def accept(self) -> None:
        """The Program that was compared last stands."""
        self._last = self._next

    def shallow(self, program: Program) -> str:
        """Why the probe tells little about a Program's cache, or an empty string."""
        wanted = reach(program.cache)
        prompt = self._probe.prefix if self._probe else None
        if prompt is None or prompt >= wanted:
            return ""
        return f"the cache encodes nothing before {wanted} tokens, but the probe's prompt ends at {prompt}"

    def same_on_dense_cache(self, before: Program, after: Program) -> bool:
        """Whether two Programs with one lossy cache plan agree exactly once the cache keeps everything in float32.

        An encoded cache turns the rounding of a reordered sum into a different code now and then, so that an exact
        rewrite may differ through it.
        """
        if before.cache is None or before.cache != after.cache or self._probe is None:
            return False
        dense = CachePlan(tuple(_lossless(site) for site in before.cache.sites))
        if dense == before.cache:
            return False
        pair = [replace(program, cache=dense) for program in (before, after)]
        divergence = compare_outputs(*(observe(program, self._probe) for program in pair))
        return divergence.max_error <= TOLERANCE

    def _asked(self, before: Program, after: Program) -> tuple[Probe, Outputs]:
        """The probe, and what `before` answers to it."""
        wanted = max(self._reach, reach(after.cache))
        if self._probe is None or wanted > self._reach:
            self._reach = wanted
            self._probe = probe(self._source, self._unseen, wanted)
            self._first = observe(self._source, self._probe)
            self._last = Answers(None, self._last.from_source)
        if self._last.outputs is None:
            alike = same_computation(self._source, before)
            self._last = Answers(self._first if alike else observe(before, self._probe), self._last.from_source)
        assert self._last.outputs is not None
        return self._probe, self._last.outputs

    def _restart(self, after: Program) -> None:
        """What was remembered means nothing to this Program: it is the first one from now on, if it stands."""
        self._source, self._unseen, self._probe = after, None, None
        self._next = Answers(None, None)


def _lossless(site: Site) -> Site:
    return replace(site, dense="float32", sink=0, tail=None, keys=None, values=None, select=None)
