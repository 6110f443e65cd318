"""Keeps some of the tokens that leave the tail (A Simple and Effective L2 Norm-Based Strategy for KV Cache, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx

from ...ir import cache
from ...ir.errors import SmeltError
from ...ir.ops import CACHED_ATTENTION, LAYER_NORM, LINEAR, RMS_NORM, arguments, is_op
from ...ir.program import Program
from .._contracts import cached_decoder, within_context
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import PAGE, SINK, TAIL, changed, faults


@dataclass(frozen=True)
class Select(Pass):
    """Of every page of tokens that leaves the tail, each KV head keeps some for itself; the others are gone.

    score: what makes a token worth keeping: key_norm (low L2 norms), key_diff (unlike the mean key), value_norm,
        recency, stride, random or centers; by default what cache.score said, or key_norm. Attention needs cache.score.
    keep: fraction that survives: of a page, of a prompt, or of the budget after an overflow.
    budget: most tokens per KV head beyond sinks and tail. With when: page the oldest pages go first (null: no limit,
        0: none).
    when: page chooses among each page that leaves the tail; prompt once over a whole prompt, and keeps what comes
        later; overflow over all that is stored, whenever it exceeds the budget.
    heads: even, adaptive (a layer's tokens go to the heads that score higher, Ada-KV) or policy (FastGen).
    floor: share of its even part that every head keeps, for heads: adaptive.
    policy: what each head must recover, for heads: policy.
    chunk: prompts are read in chunks of so many tokens, each with the question (the newest tokens, as many as
        cache.score has queries) behind it, and what it attends to is kept of the chunk and of those before (Finch). The
        cache never holds more than what is kept, a chunk and the question. Null: the prompt is one chunk.
    sink: first tokens of a sequence, which always stay.
    tail: newest tokens, which stay until they are older.
    page: tokens that leave together.
    skip_layers: layers that keep every token.

    Deviations: the paper prunes once a prompt is read and has no protected tail; here pages leave at decode time too,
    and sinks and tail are protected, because a plain norm rule drops the tokens that are being written about.

    The rule is one of large models. In the bundled reference model of 6 layers it is the other way round: with half of
    each page gone from 640 tokens, the next 128 cost a KL of 0.44 by lowest norm, 0.45 by recency, 0.24 at random and
    0.17 by highest norm (2026-11).
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    score: Literal["key_norm", "key_diff", "value_norm", "recency", "stride", "random", "centers"] | None = None
    keep: float = 0.5
    budget: int | None = None
    when: Literal["page", "prompt", "overflow"] = "page"
    heads: Literal["even", "adaptive", "policy"] = "even"
    floor: float = 0.2
    policy: cache.Policy | None = None
    chunk: int | None = None
    sink: int = SINK
    tail: int = TAIL
    page: int = PAGE
    skip_layers: tuple[int, ...] = (0, 1)  # where low norm does not go with high attention (section 3 of the paper)

    def __post_init__(self) -> None:
        stand_in = cache.Score(queries=1) if self.chunk is not None else cache.Score("value_norm")
        self._select(cache.Score(self.score) if self.score else stand_in)  # refuses what no site could follow
        if self.keep == 1.0 and self.budget is None and self.when == "page":
            raise SmeltError(
                "keep 1.0 without a budget drops no token: lower keep, set a budget, or leave the step out"
            )

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan whose sites are not selected from yet and whose pages are not closed by per-channel codes."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        yield from within_context(program, self.budget)
        if self.chunk is not None and "parallel" in program.facts:
            yield (
                "pieces that are read apart have no question behind them: leave chunk out, or the step cache.parallel"
            )
        layers = [site.layer for site in program.cache.sites]
        unknown = sorted(set(self.skip_layers) - set(layers))
        if unknown:
            yield f"skip_layers names layer {unknown[0]}, but the cache has the layers {layers[0]} to {layers[-1]}"
        sites, since = self._sites(program.cache), program.changed_by("cache")
        if not sites:
            yield f"skip_layers leaves none of the layers {layers[0]} to {layers[-1]} to select from"
        for site in sites:
            if site.select is not None:
                yield (
                    f"layer {site.layer} must keep every token, but already keeps {site.select.keep:g} of them by "
                    f"{site.select.score.by}{since}: put both into one cache.select"
                )
                return
            for role, encoding in (("keys", site.keys), ("values", site.values)):
                if getattr(encoding, "axis", None) == "channel":
                    yield (
                        f"token-granular selection must come before {role} are stored per channel"
                        f"{f' ({since.strip()})' if since else ''}: move cache.select in front"
                    )
                    return
        yield from faults(sites, self._selected)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the selection of every site that is not skipped."""
        assert program.cache is not None
        step, sites = self._spelled(program), self._sites(program.cache)
        skipped = {f"layer {site.layer}": "named in skip_layers" for site in program.cache.sites if site not in sites}
        program.cache = changed(program.cache, sites, step._selected)
        program.touch("cache")
        strange = _strange_norms(program) if self._by_norm(program.cache) else None
        notes = {"key_norm": strange} if strange else {}
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped, notes)

    def _spelled(self, program: Program) -> Select:
        """This step with the classes of tokens that capture found in the tokenizer, where it names none."""
        if self.policy is None or self.policy.special or self.policy.punctuation:
            return self
        classes: dict[str, Any] = program.facts.pop("token_classes", {})
        return replace(self, policy=replace(self.policy, **classes))

    def _by_norm(self, plan: cache.CachePlan) -> bool:
        return any(site.select is not None and site.select.score.by == "key_norm" for site in plan.sites)

    def _sites(self, plan: cache.CachePlan) -> list[cache.Site]:
        return [site for site in plan.sites if site.layer not in self.skip_layers]

    def _selected(self, site: cache.Site) -> cache.Site:
        score = cache.Score(self.score) if self.score else site.score or cache.Score("key_norm")
        return replace(site, select=self._select(score), sink=self.sink, tail=self.tail, page=self.page)

    def _select(self, score: cache.Score) -> cache.Select:
        return cache.Select(score, self.keep, self.budget, self.when, self.heads, self.floor, self.policy, self.chunk)


def _strange_norms(program: Program) -> str | None:
    """Why the norm of a key says less about attention in this model than in those of the paper, or None."""
    normed, biased = 0, 0
    for node in program.calls(CACHED_ATTENTION):
        source = _source(arguments(node)["key"])
        normed += is_op(source, RMS_NORM, LAYER_NORM)
        biased += is_op(source, LINEAR) and arguments(source)["bias"] is not None
    if normed:
        return f"keys of {normed} layers are normalised before they are stored, so that their norms differ little"
    if biased:
        return f"keys of {biased} layers carry a bias, which is part of their norm"
    return None


def _source(key: fx.Node) -> fx.Node:
    """The norm or projection that a key comes from, behind rotations and views."""
    while not is_op(key, RMS_NORM, LAYER_NORM, LINEAR):
        first = key.args[0] if key.args else None
        if not isinstance(first, fx.Node):
            return key
        key = first
    return key
