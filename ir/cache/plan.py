"""What a KV cache stores: one site per attention layer, each a sink, a body of encoded pages and a dense tail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import sympy

from ..encoding import Dense, Encoding, parse
from ..errors import SmeltError

POSITION_BITS = 32  # one int32 for each token of the body whose position the layout does not imply

Length: TypeAlias = int | sympy.Expr


class Counts(NamedTuple):
    """Stored tokens per KV head, by segment."""

    sink: int
    body: int
    tail: int


@dataclass(frozen=True)
class Select:
    """Which tokens of a page survive when it leaves the tail, for each KV head alone.

    `key_norm` keeps the lowest L2 norms of the stored key (A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression, 2024), `recency` the newest. `keep`: surviving fraction. `budget`: most body tokens per KV head; the
    oldest whole pages go when it is exceeded, so that memory is constant (0: nothing outlives the tail).
    """

    score: Literal["key_norm", "recency"]
    keep: float = 1.0
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.score not in ("key_norm", "recency"):
            raise SmeltError(f"select: unknown score '{self.score}'; known: key_norm, recency")
        if not 0.0 <= self.keep <= 1.0:
            raise SmeltError(f"select: keep is a fraction between 0 and 1, not {self.keep}")
        if self.budget is not None and self.budget < 0:
            raise SmeltError(
                f"select: budget counts tokens, {self.budget} is negative; 0 keeps nothing beyond the tail"
            )


@dataclass(frozen=True)
class Site:
    """How one layer stores its keys and values; every row of a batch follows it by its own committed length.

    The newest tokens stand in the tail, in `dense`. Whenever the tail holds `tail + page` tokens beyond the sinks, the
    oldest `page` of them leave together: `select` picks the survivors of each KV head, and these are encoded, in
    position order, as one closed page of the body. The first `sink` tokens never leave. `tail=None`: everything stays.
    `keys` and `values` encode pages `[..., kept, dim]`; None is `dense`.
    """

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    dense: str = "float32"
    sink: int = 0
    tail: int | None = None
    page: int = 64
    keys: Encoding | None = None
    values: Encoding | None = None
    select: Select | None = None

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
        if self.sink < 0 or (self.window is not None and self.window < 1):
            yield "sink must not be negative, window must be positive or none"
        if self.tail is None:
            if self.sink or self.keys or self.values or self.select:
                yield "sink, keys, values and select act on tokens that leave the tail, and none does: set `tail`"
            return
        if self.tail < 0:
            yield f"tail counts tokens, {self.tail} is negative"
        budget = self.select.budget if self.select else None
        if budget is not None and 0 < budget < self.kept:
            yield f"a budget of {budget} tokens does not hold one page of {self.kept}: raise it, or lower page or keep"
        for role, encoding in (("keys", self.keys), ("values", self.values)) if self.kept else ():
            yield from self._encoding_faults(role, encoding)

    def _encoding_faults(self, role: str, encoding: Encoding | None) -> Iterator[str]:
        if encoding is None:
            return
        dim = self.key_dim if role == "keys" else self.value_dim
        if why := encoding.refuses((self.kv_heads, self.kept, dim)):
            keep = f"page {self.page} keeps {self.kept} tokens"
            yield f"{role} {encoding} cannot store a page ({keep}): {why}; change group, page or keep"
        group = getattr(encoding, "group", 0)
        if getattr(encoding, "axis", None) == "channel" and self.tail is not None and self.tail < group:
            yield (
                f"{role} {encoding} closes groups of {group} tokens, but the tail keeps {self.tail}: "
                f"set tail to {group} or more, or a smaller group"
            )

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.heads // self.kv_heads

    @property
    def kept(self) -> int:
        """Tokens of a page that survive, per KV head."""
        if self.select is None:
            return self.page
        if self.select.budget == 0:
            return 0
        return math.ceil(self.select.keep * self.page - 1e-9)  # 0.1 * 30 is a little more than 3 in floating point

    @property
    def scattered(self) -> bool:
        """Whether the positions of a page's survivors depend on the data."""
        return self.select is not None and self.select.score == "key_norm" and 0 < self.kept < self.page

    @property
    def places(self) -> bool:
        """Whether the positions of body tokens are stored: where data decides them, or a window must read them."""
        return self.kept > 0 and self.tail is not None and (self.scattered or self.window is not None)

    @property
    def key_encoding(self) -> Encoding:
        """How the body stores keys."""
        return self.keys or Dense(self.dense)

    @property
    def value_encoding(self) -> Encoding:
        """How the body stores values."""
        return self.values or Dense(self.dense)

    def flushed(self, length: int) -> int:
        """Pages that have left the tail of a row of this committed length."""
        return 0 if self.tail is None else max(0, length - self.sink - self.tail) // self.page

    def counts(self, length: int) -> Counts:
        """Stored tokens by segment; sinks stand in the tail until the first page leaves."""
        flushed = self.flushed(length)
        if not flushed:
            return Counts(0, 0, length)
        held = min(flushed, self.pages(length))
        return Counts(self.sink, held * self.kept, length - self.sink - flushed * self.page)

    def room(self, length: int) -> int | None:
        """Tokens up to and including the one that makes the next page leave; None: none ever will."""
        if self.tail is None:
            return None
        return self.sink + self.tail + (self.flushed(length) + 1) * self.page - length

    def pages(self, capacity: int) -> int:
        """Most pages that the body of a row holds within this context."""
        if not self.kept:
            return 0
        most = self.flushed(capacity)
        budget = self.select.budget if self.select else None
        return most if budget is None else min(most, budget // self.kept)

    def bits(self, context: Length) -> sympy.Expr:
        """Stored bits of one sequence of `context` tokens: codes, scales, zeros, positions, and the dense rest."""
        length = sympy.sympify(context)
        token = self.kv_heads * (self.key_dim + self.value_dim) * Dense(self.dense).bits((1,))
        if self.tail is None:
            return token * length
        flushed = sympy.floor(sympy.Max(0, length - self.sink - self.tail) / self.page)
        dense = token * (length - flushed * self.page)
        if not self.kept:
            return dense
        page = self.key_encoding.bits((self.kv_heads, self.kept, self.key_dim))
        page += self.value_encoding.bits((self.kv_heads, self.kept, self.value_dim))
        page += POSITION_BITS * self.kv_heads * self.kept if self.places else 0
        budget = self.select.budget if self.select else None
        return dense + page * (flushed if budget is None else sympy.Min(flushed, budget // self.kept))

    def to_dict(self) -> dict[str, Any]:
        """JSON form; encodings as their specs."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        specs = {role: data[role] and data[role].spec() for role in ("keys", "values")}
        return {**data, **specs, "select": self.select and asdict(self.select)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """Inverse of `to_dict`."""
        specs = {role: parse(data[role]) for role in ("keys", "values") if data.get(role)}
        select = Select(**data["select"]) if data.get("select") else None
        return cls(**{**data, **specs, "select": select})


@dataclass(frozen=True)
class CachePlan:
    """The sites of a model, one for each layer that attends, in layer order."""

    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        layers = [site.layer for site in self.sites]
        if len(set(layers)) != len(layers):
            raise SmeltError(f"a cache plan has one site a layer, but got layers {layers}")

    def __getitem__(self, layer: int) -> Site:
        """The site of a layer."""
        for site in self.sites:
            if site.layer == layer:
                return site
        raise SmeltError(f"the cache plan has no site for layer {layer}; it has {[s.layer for s in self.sites]}")

    def bits(self, context: Length) -> sympy.Expr:
        """Stored bits of one sequence of `context` tokens over all sites."""
        return sum((site.bits(context) for site in self.sites), sympy.Integer(0))

    def bits_per_value(self, context: Length) -> sympy.Expr:
        """Stored bits per cached key or value scalar of the whole context, metadata and evicted tokens included."""
        values = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.sites)
        return self.bits(context) / (values * sympy.sympify(context))

    def with_site(self, site: Site) -> CachePlan:
        """The plan with the site of one layer replaced."""
        self[site.layer]
        return replace(self, sites=tuple(site if s.layer == site.layer else s for s in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"sites": [site.to_dict() for site in self.sites]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CachePlan:
        """Inverse of `to_dict`."""
        return cls(tuple(Site.from_dict(site) for site in data["sites"]))
