"""The decode plan: drafter → tree → verify → accept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ..errors import SmeltError, nearest
from . import accept as accepts
from . import draft as drafts
from .accept import Accept, Walk
from .draft import Draft, Union
from .tree import Tree

WALK = Walk()


@dataclass(frozen=True)
class DecodePlan:
    """Who drafts, and how what the model says of the draft is accepted.

    `limits`: drafted tokens of a step at most, greedy and sampled, as measured on a machine; 0: it does not draft.
    `tables`: what drafters and rules look up, by name, such as `trigrams.pairs`; `stamp`: their hash, by which plans
    compare.
    """

    draft: Draft
    accept: Accept = WALK
    limits: tuple[int, int] | None = None
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    stamp: str = ""

    def __post_init__(self) -> None:
        if self.limits is not None and (len(self.limits) != 2 or min(self.limits) < 0):
            raise SmeltError(f"limits are two numbers of tokens from 0, not {self.limits}")
        if self.draft.proposal not in self.accept.proposals:
            raise SmeltError(
                f"acceptance by {accepts.kind(self.accept)} is not valid for the drafts of {self.drafter}, which are "
                f"{self.draft.proposal}: it takes {' or '.join(sorted(self.accept.proposals))} ones; accept by walk"
            )

    @property
    def drafter(self) -> str:
        """The name of the drafter's kind."""
        return drafts.kind(self.draft)

    def limit(self, greedy: bool) -> int | None:
        """Drafted tokens of a step at most, where that was measured."""
        return None if self.limits is None else self.limits[0 if greedy else 1]

    @property
    def exact(self) -> bool:
        """Whether what is generated has the model's own law."""
        return self.accept.law == "exact"

    def with_tables(self, tables: Mapping[str, torch.Tensor]) -> DecodePlan:
        """The plan with these tables beside those that it has."""
        held = {**self.tables, **{name: table.contiguous() for name, table in tables.items()}}
        return replace(self, tables=held, stamp=stamped(held))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the tables themselves."""
        stamp = {"stamp": self.stamp} if self.stamp else {}
        limits = {"limits": list(self.limits)} if self.limits is not None else {}
        return {"draft": _told(self.draft), "accept": _told(self.accept), **limits, **stamp}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecodePlan:
        """Inverse of `to_dict`."""
        draft, accept = _made(data["draft"], drafts.KINDS), _made(data["accept"], accepts.KINDS)
        limits = tuple(data["limits"]) if "limits" in data else None
        return cls(draft, accept, limits, stamp=data.get("stamp", ""))


def stamped(tables: Mapping[str, torch.Tensor]) -> str:
    """A hash of tables, by which plans compare; nothing of none."""
    digest = hashlib.sha256()
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {table.dtype} {list(table.shape)}".encode())
        digest.update(table.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if tables else ""


def _told(part: Draft | Accept) -> dict[str, Any]:
    name = drafts.kind(part) if isinstance(part, Draft) else accepts.kind(part)
    return {"kind": name, **{field.name: _plain(getattr(part, field.name)) for field in fields(part)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Tree):
        return {"parents": list(value.parents), "ranks": list(value.ranks)}
    if isinstance(value, Draft):
        return _told(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _made(data: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> Any:
    given = dict(data)
    name = given.pop("kind")
    if name not in kinds:
        raise SmeltError(f"decode plan: unknown kind '{name}'{nearest(name, kinds)}; known: {', '.join(kinds)}")
    if given.get("tree") is not None:
        given["tree"] = Tree(tuple(given["tree"]["parents"]), tuple(given["tree"]["ranks"]))
    if "rates" in given:
        given["rates"] = tuple(tuple(ranks) for ranks in given["rates"])
    if kinds[name] is Union:
        given["drafts"] = tuple(_made(each, drafts.KINDS) for each in given["drafts"])
    return kinds[name](**given)
