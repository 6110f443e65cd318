"""The choice plan: what a recipe says of how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, get_args

import torch

from ..decode.plan import stamped
from ..errors import SmeltError, nearest
from .preset import Preset
from .search import KINDS, Search, kind

NOTHING = Preset()
Constrain: TypeAlias = Literal["mask", "align", "reject"]


@dataclass(frozen=True)
class ChoicePlan:
    """Sampling options that hold by default, a search in the place of a draw, and how answers are held to grammars.

    `tables`: what the search looks up, by name; `stamp`: their hash, by which plans compare.
    """

    preset: Preset = NOTHING
    search: Search | None = None
    constrain: Constrain = "mask"
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    stamp: str = ""

    def __post_init__(self) -> None:
        if self.constrain not in get_args(Constrain):
            raise SmeltError(f"choice plan: a grammar constrains by mask, align or reject, not {self.constrain!r}")

    @property
    def name(self) -> str:
        """The search's kind, or an empty string."""
        return "" if self.search is None else kind(self.search)

    def with_tables(self, tables: Mapping[str, torch.Tensor]) -> ChoicePlan:
        """The plan with these tables."""
        held = {name: table.contiguous() for name, table in tables.items()}
        return replace(self, tables=held, stamp=stamped(held))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the tables themselves."""
        told: dict[str, Any] = {}
        if self.preset.options:
            told["preset"] = self.preset.options
        if self.search is not None:
            options = {option.name: getattr(self.search, option.name) for option in fields(self.search)}
            lists = {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
            told["search"] = {"kind": kind(self.search), **options, **lists}
        if self.constrain != "mask":
            told["constrain"] = self.constrain
        if self.stamp:
            told["stamp"] = self.stamp
        return told

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoicePlan:
        """Inverse of `to_dict`."""
        search = _made(data["search"]) if "search" in data else None
        return cls(Preset(**data.get("preset", {})), search, data.get("constrain", "mask"), stamp=data.get("stamp", ""))


def _made(data: Mapping[str, Any]) -> Search:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    name = given.pop("kind")
    if name not in KINDS:
        raise SmeltError(f"choice plan: unknown kind '{name}'{nearest(name, KINDS)}; known: {', '.join(KINDS)}")
    return KINDS[name](**given)
