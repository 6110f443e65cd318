"""A sum of encodings: each next one stores the error of those before it."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from .base import Encoding, Parts, checked
from .expr import Bin, Expr, renamed
from .sparse import Sparse

ORDERS = ("given", "outliers")


@dataclass(frozen=True)
class Sum(Encoding):
    """`x = term a + term b + …` on `[..., N, K]`; the parts of the terms are named `a_codes`, `b_index`, ….

    `first="given"`: the terms encode in their order. `first="outliers"` (GEAR, 2024, arXiv 2403.05527): the entries of
    the sparse term are chosen first, by the values themselves, and the other terms see the mean of their row's (or
    channel's) others there, so that outliers do not widen their range; what the sparse term stores is the error there.
    """

    name: ClassVar[str] = "sum"
    terms: tuple[Encoding, ...]
    first: str = "given"

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not all(isinstance(term, Encoding) for term in self.terms):
            raise SmeltError(
                "sum: terms is a list of encodings, such as [{affine: {bits: 2, group: 64}}, {low_rank: 4}]"
            )
        if not 1 < len(self.terms) <= len(string.ascii_lowercase):
            raise SmeltError(f"sum: terms needs two encodings or more, not {len(self.terms)}")
        if self.first not in ORDERS:
            raise SmeltError(
                f"sum: first must be given or outliers, not {self.first!r}{nearest(str(self.first), ORDERS)}"
            )
        if self.first == "outliers" and sum(isinstance(term, Sparse) for term in self.terms) != 1:
            raise SmeltError("sum: first=outliers takes the entries of one sparse term, such as {sparse: 0.02}")

    @property
    def calibrated(self) -> bool:
        """If any term is."""
        return any(term.calibrated for term in self.terms)

    @property
    def closes(self) -> int:
        """The rows that all terms close together."""
        return math.lcm(*(term.closes for term in self.terms))

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tables of each term, from the error that the terms before it leave."""
        found: dict[str, torch.Tensor] = {}
        if not self.calibrated:
            return {prefix + part: value for prefix, term in self._named() for part, value in term.fit(x).items()}
        rest, _ = self._filled(x.float())
        last = max((i for i, term in enumerate(self.terms) if term.calibrated), default=-1)
        for i, (prefix, term) in enumerate(self._named()):
            if self._later(term):
                continue
            tables = term.fit(rest, weight)
            found |= {prefix + part: value for part, value in tables.items()}
            if i < last:
                rest = rest - term.decode({**term.encode(rest, tables or None), **tables}, tuple(rest.shape))
        return found

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """Term by term, each on what is left."""
        x = checked(self, x)
        rest, places = self._filled(x)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        filled = rest
        for prefix, term in self._named():
            if not self._later(term):
                own = _of(tables, prefix)
                parts[prefix] = term.encode(rest, own or None)
                rest = rest - term.decode({**own, **parts[prefix]}, tuple(x.shape))
        for prefix, term in self._named():
            if self._later(term) and isinstance(term, Sparse) and places is not None:
                parts[prefix] = term.at(rest + (x - filled), places)
        return {prefix + part: value for prefix, _ in self._named() for part, value in parts[prefix].items()}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The sum of what the terms decode to, in float32, then `dtype`."""
        first, *others = (term.decode(_of(parts, prefix), shape) for prefix, term in self._named())
        for other in others:
            first = first + other
        return first.to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of all terms."""
        return sympy.expand(sum((term.stored_bits(shape) for term in self.terms), sympy.Integer(0)))

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of all terms."""
        return sympy.expand(sum((term.table_bits(shape) for term in self.terms), sympy.Integer(0)))

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The sum of the terms' expressions."""
        first, *others = (renamed(term.expr(shape), prefix) for prefix, term in self._named())
        for other in others:
            first = Bin("add", first, other)
        return first

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """What the first term that refuses says."""
        reasons = ((term, term.refuses(shape)) for term in self.terms)
        return next((f"its term {term}: {reason}" for term, reason in reasons if reason), None)

    def _named(self) -> Iterator[tuple[str, Encoding]]:
        return ((f"{letter}_", term) for letter, term in zip(string.ascii_lowercase, self.terms, strict=False))

    def _later(self, term: Encoding) -> bool:
        """Whether the term stores what all others leave at entries chosen before."""
        return self.first == "outliers" and isinstance(term, Sparse)

    def _filled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the terms see, and the entries that were chosen first."""
        sparse = next((term for term in self.terms if isinstance(term, Sparse) and self._later(term)), None)
        if sparse is None:
            return x, None
        places = sparse.places(x)
        dim = sparse.dim
        kept = max(1, x.shape[dim] - places.shape[dim])
        mean = (x.sum(dim, keepdim=True) - x.gather(dim, places).sum(dim, keepdim=True)) / kept
        return x.scatter(dim, places, mean.expand(places.shape)), places


def _of(parts: Parts | None, prefix: str) -> dict[str, torch.Tensor]:
    """The parts of one term by its own names."""
    return {name.removeprefix(prefix): part for name, part in (parts or {}).items() if name.startswith(prefix)}
