"""A small matcher for graph patterns: trees of calls with named holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Hole:
    """Matches anything and binds it; a name that occurs twice must match the same thing."""

    name: str


@dataclass(frozen=True)
class Call:
    """Matches a call of one of `targets`; `swaps` also tries the first two arguments the other way round."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    swaps: bool = False


@dataclass(frozen=True)
class Maybe:
    """Matches `wrapped` around `inner`, or `inner` itself; the wrapper's holes stay unbound when it is absent."""

    wrapped: Call
    inner: Any


def match(pattern: Any, value: Any, bound: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The bindings under which `pattern` equals `value` (a node or a constant), or None."""
    bound = dict(bound or {})
    if isinstance(pattern, Hole):
        if pattern.name in bound:
            return bound if bound[pattern.name] is value or _same(bound[pattern.name], value) else None
        return bound | {pattern.name: value}
    if isinstance(pattern, Maybe):
        found = match(pattern.wrapped, value, bound)
        return found if found is not None else match(pattern.inner, value, bound)
    if isinstance(pattern, Call):
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in pattern.targets:
            return None
        if len(value.args) < len(pattern.args):
            return None
        found = _match_all(pattern.args, value.args, bound)
        if found is None and pattern.swaps:
            found = _match_all((pattern.args[1], pattern.args[0], *pattern.args[2:]), value.args, bound)
        return found
    if isinstance(pattern, list | tuple):
        if not isinstance(value, list | tuple) or len(pattern) != len(value):
            return None
        return _match_all(tuple(pattern), tuple(value), bound)
    return bound if _same(pattern, value) else None


def _match_all(patterns: tuple[Any, ...], values: tuple[Any, ...], bound: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = bound
    for pattern, value in zip(patterns, values, strict=False):
        found = match(pattern, value, found)
        if found is None:
            return None
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is not fx.Node and type(b) is not fx.Node and bool(a == b)
