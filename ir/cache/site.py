"""How one layer stores its keys and values: sinks, bodies of encoded pages, and a dense tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from ..encoding import Encoding, parse
from ..errors import SmeltError
from .code import Code
from .estimate import Estimate
from .geometry import Counts, Geometry, Length
from .hyper import Hyper
from .options import Merge, Predict, Retrieve, Rope, Select, Tier, plain
from .policy import Policy
from .score import Score

__all__ = ["Counts", "Length", "Site"]


@dataclass(frozen=True)
class Site(Geometry):
    """How one layer stores its keys and values; every row of a batch follows it by its own committed length.

    The newest tokens stand in the tail, in `dense`. Whenever the tail holds `tail + page` tokens beyond the sinks, the
    oldest `page` of them leave together: `select` picks the survivors of each KV head, and these are encoded, in
    position order, as one closed page of the body. The first `sink` tokens never leave. `tail=None`: everything stays.
    `keys` and `values` encode pages `[..., kept, dim]`; None is `dense`. Where `select` acts on prompts, what lies
    between the sinks and the tail of a prompt leaves at once when it ends.

    `tiers`: further bodies; `hold`: most tokens of the first before its oldest pages go down to the next.
    `frame`: `pre` stores body keys as they were before their rotation by `rope`, and turns them when they are read.
    `compact`: positions are those within the cache: body tokens stand right in front of the tail, sinks before them.
    `merge`, `predict`, `retrieve`, `code`, `hyper`: see their classes. `score`: for a selection to come. `scale`,
    `softcap`: of the attention, for scores. `schedule`: how workers divide a step, by free chunks or equal runs.
    """

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise SmeltError(f"cache site of layer {self.layer}: {fault}")

    def _faults(self) -> Iterator[str]:
        """Why this site cannot be stored, each with its way out."""
        if min(self.heads, self.kv_heads, self.key_dim, self.value_dim, self.page) < 1:
            yield "heads, kv_heads, dims and page must be positive"
        if self.heads % self.kv_heads:
            yield f"{self.heads} query heads do not share {self.kv_heads} KV heads evenly"
        if self.dense not in ("float32", "float16", "bfloat16"):
            yield f"dense '{self.dense}' is not float32, float16 or bfloat16"
        if self.schedule not in ("chunks", "stream_k"):
            yield f"schedule '{self.schedule}' is not chunks or stream_k"
        if self.sink < 0 or (self.window is not None and self.window < 1):
            yield "sink must not be negative, window must be positive or none"
        if self.tail is None:
            if self.sink or self.keys or self.values or self.select or self.tiers or self.retrieve or self.estimate:
                yield "sink, keys, values and select act on tokens that leave the tail, and none does: set `tail`"
            return
        if self.code is not None:
            yield (
                "its prompts are coded, which needs all tokens as they were read, but a tail lets them go: leave out "
                "cache.code (what this recipe stores is saved lossless), or the step that sets the tail"
            )
        if self.tail < 0:
            yield f"tail counts tokens, {self.tail} is negative"
        yield from self._choice_faults()
        yield from self._estimate_faults()
        yield from self._frame_faults()
        for number, cap in enumerate(self.caps if self.kept else ()):
            if not cap:
                yield f"tier {number} gets less than one of {self.survivors} tokens of a page: raise its share, or page"
                return
            for role in ("keys", "values"):
                yield from self._encoding_faults(role, self.encodings[number][role == "values"], cap)

    def _choice_faults(self) -> Iterator[str]:
        """What does not go together among selection, tiers and merging."""
        select, shares = self.select, [tier.share for tier in self.tiers if tier.share is not None]
        budget = select.budget if select else None
        if budget is not None and 0 < budget < self.kept:
            yield f"a budget of {budget} tokens does not hold one page of {self.kept}: raise it, or lower page or keep"
        if shares and len(shares) != len(self.tiers):
            yield "tiers either share what leaves the tail or take what the one above lets go: share all, or none"
        if shares and sum(shares) >= 1:
            yield f"tiers share {sum(shares):g} of what survives, which leaves nothing to the first body"
        if shares and select is None:
            yield "tiers that share tokens need a score to sort them by: put cache.select in front"
        if shares and budget is not None:
            yield "a budget and tiers that share tokens do not go together: lower keep instead"
        if shares and self.hold is not None:
            yield "hold is for tiers by age, and these share tokens by score: leave hold out"
        if small := [tier.budget for tier in self.tiers if tier.budget is not None and tier.budget < self.page]:
            yield f"a tier's budget of {small[0]} tokens does not hold one page of {self.page}: raise it, or lower page"
        if self.tiers and not shares and (select is not None or self.hold is None):
            yield "tiers by age need `hold`, the tokens of the first body, and no selection"
        if self.hold is not None and (self.hold < self.page or not self.tiers):
            yield f"hold {self.hold} must be at least a page of {self.page}, with a tier below that takes older pages"
        if self.merge and (select is None or select.when != "prompt"):
            yield "merging takes the tokens that a selection over the prompt leaves out: set select with when: prompt"
        if select is not None and (select.when == "overflow" or select.chunk):
            what, out = (f"chunk: {select.chunk}", "no chunk") if select.chunk else ("when: overflow", "when: prompt")
            for role, encoding in (("keys", self.keys), ("values", self.values)):
                if encoding is not None:
                    yield (
                        f"select with {what} drops single tokens of the body again and again, but {role} are "
                        f"stored as {encoding}, in closed pages: store them dense, or select with {out}"
                    )
        if select is not None and select.chunk:
            yield from self._chunk_faults(select.chunk, select.question)

    def _chunk_faults(self, chunk: int, question: int) -> Iterator[str]:
        """What does not go together with a prompt that is read in chunks."""
        if chunk < self.page:
            yield f"a chunk of {chunk} tokens does not hold one page of {self.page}: raise chunk, or lower page"
        if self.tail is not None and self.tail > question:
            yield (
                f"the tail keeps {self.tail} tokens of a prompt, but only the question of {question} is there behind "
                "the last chunk: lower tail, or ask more queries"
            )
        others = {"merging": self.merge, "tiers": self.tiers, "retrieve": self.retrieve, "attention.hyper": self.hyper}
        for name, option in others.items():
            if option:
                yield f"{name} needs prompts as a whole, select with chunk: {chunk} reads parts: leave one of them out"

    def _estimate_faults(self) -> Iterator[str]:
        """What does not go together with estimated sums."""
        if self.estimate is None:
            return
        if self.window is not None:
            yield f"its window forgets tokens at a distance of {self.window}, which samples of all tokens cannot"
        if self.frame == "pre" or self.compact:
            yield "samples are drawn again and again from keys as they are read: estimate with frame: post"
        steps: dict[str, object] = {"select": self.select, "tier": self.tiers, "retrieve": self.retrieve}
        steps |= {"predict": self.predict, "encode": self.keys or self.values}
        if found := [name for name, option in steps.items() if option]:
            yield (
                f"cache.{found[0]} acts on tokens that stand for themselves, but an estimate holds samples that stand "
                "for others, and draws anew at every page: leave one of the two out"
            )

    def _frame_faults(self) -> Iterator[str]:
        """What does not go together among frames, positions and partial reading."""
        if self.frame not in ("post", "pre"):
            yield f"frame '{self.frame}' is not post or pre"
        if self.frame == "pre" and self.rope is None:
            yield "frame pre needs keys that were rotated by their positions, and these were not"
        if self.rope is not None and 2 * len(self.rope.inverse) > self.key_dim:
            yield f"rope turns {2 * len(self.rope.inverse)} dims, keys have {self.key_dim}"
        if self.compact and self.rope is not None and self.frame != "pre":
            yield "compact moves keys to other positions: store them un-rotated, with frame: pre"
        merged = self.merge is not None and not self.merge.values_only
        if merged and self.rope is not None and self.frame != "pre":
            yield "merging averages keys of different positions: store them with frame: pre, or merge values_only"
        if self.predict and (self.frame != "pre" and self.rope is not None):
            yield "a forecast from the layer before is made of un-rotated keys: store them with frame: pre"
        if self.predict and (self.select or self.tiers or self.retrieve or self.compact):
            yield (
                "a forecast from the layer before needs the same tokens in every layer, all of them read: leave out "
                "selection, tiers, retrieval and compact, or cache.predict"
            )
        if self.compact and any(tier.share is not None for tier in self.tiers):
            yield "compact keeps tokens in their order, which tiers that share them by score mix: leave one out"
        if self.compact and self.running and self.select and self.select.score.normalize == "count":
            yield "a mean of attention goes by how old tokens are, which compact forgets: score with normalize: none"
        if self.retrieve is None:
            return
        if not self.kept:
            yield "reading a part of the body needs one, and nothing survives beyond the tail: leave cache.retrieve out"
        if self.retrieve.by == "pages" and self.retrieve.budget < self.kept:
            yield f"a budget of {self.retrieve.budget} tokens does not read one page of {self.kept}"
        if len(self.caps) > 1:
            yield "reading a part of the body needs one body, and the site has tiers: leave one of the two out"
        if self.retrieve.by != "pages" and self.select is not None:
            yield (
                f"retrieve by {self.retrieve.by} has one list for all KV heads, but each keeps tokens of its own: "
                "retrieve by pages, or leave the selection out"
            )
        if self.retrieve.by == "pages" and self.compact:
            yield "bounds of pages hold for the positions of their keys, which compact moves: leave one of the two out"

    def _encoding_faults(self, role: str, encoding: Encoding, cap: int) -> Iterator[str]:
        dim = self.key_dim if role == "keys" else self.value_dim
        if why := encoding.refuses((self.kv_heads, cap, dim)):
            keep = f"page {self.page} keeps {cap} tokens"
            yield f"{role} {encoding} cannot store a page ({keep}): {why}; change group, page or keep"
        group = getattr(encoding, "group", 0)
        if getattr(encoding, "axis", None) == "channel" and self.tail is not None and self.tail < group:
            yield (
                f"{role} {encoding} closes groups of {group} tokens, but the tail keeps {self.tail}: "
                f"set tail to {group} or more, or a smaller group"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form; encodings as their specs, options that say nothing left out."""
        always = 12  # fields that every site has
        told = enumerate((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: plain(v) for at, (field, v) in told if at <= always or v != field.default}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """Inverse of `to_dict`."""
        read = dict(data)
        for role in ("keys", "values"):
            read[role] = _encoding(data.get(role))
        tiers = [{**tier, **{r: _encoding(tier.get(r)) for r in ("keys", "values")}} for tier in data.get("tiers", ())]
        read["tiers"] = tuple(Tier(**tier) for tier in tiers)
        if select := data.get("select"):
            policy = Policy(**select["policy"]) if select.get("policy") is not None else None
            score = select["score"]
            told = score if isinstance(score, str) else Score(**score)
            read["select"] = Select(**{**select, "score": told, "policy": policy})
        if rope := data.get("rope"):
            read["rope"] = Rope(tuple(rope["inverse"]))
        kinds: dict[str, Any] = {"score": Score, "merge": Merge, "predict": Predict, "retrieve": Retrieve}
        kinds |= {"code": Code, "hyper": Hyper, "estimate": Estimate}
        for name, kind in kinds.items():
            if data.get(name) is not None:
                read[name] = kind(data[name]) if isinstance(data[name], str) else kind(**data[name])
        return cls(**read)


def _encoding(data: Any) -> Encoding | None:
    return parse(data) if data else None
