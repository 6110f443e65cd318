"""What a KV cache stores: one site per attention layer, and the tables that were calibrated for their encodings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch

from ..encoding import Parts
from ..errors import SmeltError
from .options import Select
from .site import Counts, Length, Site

__all__ = ["CachePlan", "Counts", "Select", "Site"]


@dataclass(frozen=True)
class CachePlan:
    """The sites of a model, one for each layer that attends, in layer order.

    `tables`: calibrated parts of encodings by `layer.role.part`, such as `3.keys.book`; roles of the first body are
    `keys` and `values`, those of tier n `keys.n` and `values.n`. `stamp`: their hash, by which plans compare.
    """

    sites: tuple[Site, ...]
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    stamp: str = ""

    def __post_init__(self) -> None:
        layers = [site.layer for site in self.sites]
        if len(set(layers)) != len(layers):
            raise SmeltError(f"a cache plan has one site a layer, but got layers {layers}")
        if len(found := self._chunks) > 1:
            raise SmeltError(
                f"layers read prompts together, but are told chunks (and questions) of {found}: give all of them one"
            )

    def __getitem__(self, layer: int) -> Site:
        """The site of a layer."""
        for site in self.sites:
            if site.layer == layer:
                return site
        raise SmeltError(f"the cache plan has no site for layer {layer}; it has {[s.layer for s in self.sites]}")

    @property
    def _chunks(self) -> list[tuple[int, int]]:
        return sorted({(s.select.chunk, s.select.question) for s in self.sites if s.select and s.select.chunk})

    @property
    def chunk(self) -> tuple[int, int] | None:
        """Tokens of a prompt that are read before some are let go, and of the question behind them; None: all."""
        return next(iter(self._chunks), None)

    @property
    def endless(self) -> bool:
        """Whether generation need not end with the model's context."""
        return all(site.endless for site in self.sites)

    def bits(self, context: Length) -> sympy.Expr:
        """Stored bits of one sequence of `context` tokens over all sites."""
        tables = sum(8 * table.numel() * table.element_size() for table in self.tables.values())
        return sum((site.bits(context) for site in self.sites), sympy.Integer(tables))

    def bits_per_value(self, context: Length) -> sympy.Expr:
        """Stored bits per cached key or value scalar of the whole context, metadata and evicted tokens included."""
        values = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.sites)
        return self.bits(context) / (values * sympy.sympify(context))

    def with_site(self, site: Site) -> CachePlan:
        """The plan with the site of one layer replaced."""
        self[site.layer]
        return replace(self, sites=tuple(site if s.layer == site.layer else s for s in self.sites))

    def with_tables(self, tables: Mapping[str, torch.Tensor]) -> CachePlan:
        """The plan with these calibrated tables beside those that it has."""
        held = {**self.tables, **{name: table.contiguous() for name, table in tables.items()}}
        return replace(self, tables=held, stamp=_stamp(held))

    def tables_of(self, layer: int, number: int) -> dict[str, Parts]:
        """The tables of one body of a layer, by role."""
        out: dict[str, dict[str, torch.Tensor]] = {"keys": {}, "values": {}, "predict": {}}
        for role, parts in out.items():
            lead = f"{layer}.{role}." if not number else f"{layer}.{role}.{number}."
            found = {name.removeprefix(lead): table for name, table in self.tables.items() if name.startswith(lead)}
            parts.update({name: table for name, table in found.items() if "." not in name})
        return dict(out)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the tables themselves."""
        stamp = {"stamp": self.stamp} if self.stamp else {}
        return {"sites": [site.to_dict() for site in self.sites], **stamp}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CachePlan:
        """Inverse of `to_dict`."""
        return cls(tuple(Site.from_dict(site) for site in data["sites"]), stamp=data.get("stamp", ""))


def _stamp(tables: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {table.dtype} {list(table.shape)}".encode())
        digest.update(table.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
