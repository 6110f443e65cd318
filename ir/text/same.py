"""Whether two Programs are the same, and if not, where they first differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..program import Program
from ..weight import Weight
from .printer import content_hash
from .types import show_type


@dataclass(frozen=True)
class _Reference:
    """A node or weight as an argument; a string of the same letters is something else."""

    to: str


def same_program(a: Program, b: Program) -> str | None:
    """The first difference in words, or None.

    Compared are name, facts, plans, history, weights (order, shape, encoding, content) and the graph, node by node:
    names, targets, arguments and derived types. A `get_attr` node is only a way to name a weight, so that its own name
    and place do not count.
    """
    tables = (
        ("name", a.name, b.name),
        ("facts", a.facts, b.facts),
        ("cache", a.cache and a.cache.to_dict(), b.cache and b.cache.to_dict()),
        ("decode", a.decode and a.decode.to_dict(), b.decode and b.decode.to_dict()),
        ("choice", a.choice and a.choice.to_dict(), b.choice and b.choice.to_dict()),
        ("depth", a.depth and a.depth.to_dict(), b.depth and b.depth.to_dict()),
        ("history", _history(a), _history(b)),
        ("weights", list(a.weights), list(b.weights)),
        ("weights", {n: _weight(w) for n, w in a.weights.items()}, {n: _weight(w) for n, w in b.weights.items()}),
        ("content", *_contents(a, b)),
        ("nodes", [n.name for n in _listed(a)], [n.name for n in _listed(b)]),
        ("node", {n.name: _node(n) for n in _listed(a)}, {n.name: _node(n) for n in _listed(b)}),
    )
    for place, left, right in tables:
        if found := _difference(place, left, right):
            return found
    if a.draft is None or b.draft is None:
        return None if a.draft is b.draft else "draft: one side has a draft model, the other has none"
    return (found := same_program(a.draft, b.draft)) and f"draft: {found}"


def _difference(place: str, a: Any, b: Any) -> str | None:
    """Where two values differ, type for type; nan equals nan."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f"{place}: {sorted(a.keys() ^ b.keys(), key=str)} stand on one side only"
        pairs = [(f"{place}.{key}", a[key], b[key]) for key in a]
    elif _sequence(a) is not None and _sequence(a) is _sequence(b):
        if len(a) != len(b):
            return f"{place}: {len(a)} entries against {len(b)}"
        pairs = [(f"{place}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if type(a) is type(b) and (a is b or repr(a) == repr(b)) else f"{place}: {a!r} against {b!r}"
    return next((found for pair in pairs if (found := _difference(*pair))), None)


def _sequence(value: Any) -> type | None:
    return next((kind for kind in (list, tuple) if isinstance(value, kind)), None)


def _listed(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op != "get_attr"]


def _node(node: fx.Node) -> dict[str, Any]:
    """A node as plain data."""
    return {
        "op": node.op,
        "target": str(node.target),
        "args": _named(node.args),
        "kwargs": _named(node.kwargs),
        "type": show_type(node.meta),
    }


def _named(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return _Reference(f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}")
    if isinstance(argument, Mapping):
        return {key: _named(value) for key, value in argument.items()}
    if isinstance(argument, list | tuple):
        return (list if isinstance(argument, list) else tuple)(map(_named, argument))
    return argument


def _history(program: Program) -> list[Any]:
    changed: dict[tuple[int, str], list[str]] = {}
    for name, record in program.origin.items():
        changed.setdefault((record.step, record.name), []).append(name)
    return [
        {"step": r.step, "name": r.name, "options": r.options, "report": r.report,
         "changed": sorted(changed.get((r.step, r.name), []))}
        for r in program.history
    ]  # fmt: skip


def _weight(weight: Weight) -> dict[str, Any]:
    return {"shape": list(weight.shape), "encoding": weight.encoding.spec()}


def _contents(a: Program, b: Program) -> tuple[dict[str, str], dict[str, str]]:
    """Hashes of the weights that are not one object on both sides."""
    apart = [name for name, weight in a.weights.items() if b.weights.get(name, weight) is not weight]
    return {n: content_hash(a.weights[n]) for n in apart}, {n: content_hash(b.weights[n]) for n in apart}
