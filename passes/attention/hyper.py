"""Reads long prompts in almost linear time (HyperAttention: Long-context Attention in Near-Linear Time, 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...ir import cache
from ...ir.errors import SmeltError
from ...ir.ops import CACHED_ATTENTION, arguments
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Hyper(Pass):
    """Queries of a long prompt read the keys of their own bucket and a sample of the others, instead of all.

    layers: how many of the last layers do so; the first ones need exact attention most (null: all).
    block: keys and queries that stand together in the order of the hash.
    sample: keys that stand for all others of a block.
    projections: bits of the angular hash.
    min_seq_len: prompts, and parts of them, up to this length are read exactly.
    sink: first tokens of a sequence, which every query reads exactly.
    seed: of the hash and of the samples.

    What the cache stores does not change, and decoding is exact. A prompt must come in one step to be read so.

    Deviations: every query reads the first tokens and at least `block` nearest ones exactly; samples are drawn for each
    block of queries and head, one from each of `sample` equal stretches of the sorted keys; a prompt is halved at whole
    blocks, so that it may have any length.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    layers: int | None = None
    block: int = 256
    sample: int = 256
    projections: int = 8
    min_seq_len: int = 2048
    sink: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        self._options  # noqa: B018 # refuses what no site could follow
        if self.layers is not None and self.layers < 1:
            raise SmeltError(f"layers counts the last layers that approximate, not {self.layers}: leave the step out")

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan of as many layers whose prompts are read exactly so far."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        sites = program.cache.sites
        if self.layers is not None and self.layers > len(sites):
            yield f"layers names the last {self.layers}, but the cache has {len(sites)}"
        for site in sites:
            if site.hyper is not None:
                since = program.changed_by("cache")
                yield f"layer {site.layer} already approximates its prompts{since}: keep one of the two steps"
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set how the last layers that can read prompts so."""
        assert program.cache is not None
        sites = program.cache.sites
        called = {int(a["layer"]): a for a in map(arguments, program.calls(CACHED_ATTENTION))}
        exact = sites[: 0 if self.layers is None else len(sites) - self.layers]
        skipped = {f"layer {site.layer}": f"not among the last {self.layers} layers" for site in exact}
        done = []
        for site in sites[len(exact) :]:
            if why := _refusal(site, called.get(site.layer, {})):
                skipped[f"layer {site.layer}"] = why
                continue
            program.cache = program.cache.with_site(replace(site, hyper=self._options))
            done.append(f"layer {site.layer}")
        if done:
            program.touch("cache")
        context = program.facts.get("context")
        never = context is not None and context <= self.min_seq_len
        notes = {"min_seq_len": f"no prompt is longer: the context is {context}"} if never and done else {}
        return Outcome(tuple(done), skipped, notes)

    @property
    def _options(self) -> cache.Hyper:
        return cache.Hyper(self.block, self.sample, self.projections, self.min_seq_len, self.sink, self.seed)


def _refusal(site: cache.Site, args: Mapping[str, Any]) -> str | None:
    """Why a layer's prompts must be read exactly, or None."""
    if site.window is not None:
        return f"its window of {site.window} tokens bounds what a query reads already"
    if args.get("softcap") is not None:
        return "its logits have a softcap, and the sample estimates a plain softmax"
    if args.get("sinks") is not None:
        return "it has a learned sink, and the sample estimates a plain softmax"
    if site.watches:
        return "its cache is chosen by the attention of the prompt, which takes the exact sums"
    return None
