"""A small matcher for graph patterns: trees of calls with named holes, and the rewrite that follows a match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ops import Op
from ..program import Program


@dataclass(frozen=True)
class Hole:
    """Matches anything and binds it; a name that occurs twice must match the same thing."""

    name: str


@dataclass(frozen=True)
class Call:
    """Matches a call of one of `targets` with exactly these arguments; `swaps` also tries the first two exchanged.

    A call with keyword arguments never matches: they may change its meaning.
    """

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    swaps: bool = False


Pattern = Any  # a Hole, a Call, a list or tuple of patterns, or a constant
Bound = dict[str, Any]


def match(pattern: Pattern, value: Any, bound: Bound | None = None) -> Bound | None:
    """The bindings under which `pattern` equals `value` (a node or a constant), or None."""
    bound = bound or {}
    if isinstance(pattern, Hole):
        if pattern.name not in bound:
            return bound | {pattern.name: value}
        return bound if _same(bound[pattern.name], value) else None
    if isinstance(pattern, Call):
        if not isinstance(value, fx.Node) or value.target not in pattern.targets or value.kwargs:
            return None
        found = _match_all(pattern.args, value.args, bound)
        if found is None and pattern.swaps:
            found = _match_all((pattern.args[1], pattern.args[0], *pattern.args[2:]), value.args, bound)
        return found
    if isinstance(pattern, list | tuple):
        return _match_all(tuple(pattern), tuple(value), bound) if isinstance(value, list | tuple) else None
    return bound if _same(pattern, value) else None


def rewrite(program: Program, node: fx.Node, op: Op, *args: Any) -> fx.Node:
    """`op(*args)` in the place of `node`, whose readers and shape it takes over."""
    with program.graph.inserting_before(node):
        call = program.graph.create_node("call_function", op.target, args, name=op.name)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    return call


def _match_all(patterns: tuple[Pattern, ...], values: tuple[Any, ...], bound: Bound) -> Bound | None:
    if len(patterns) != len(values):
        return None
    found: Bound | None = bound
    for pattern, value in zip(patterns, values, strict=True):
        found = match(pattern, value, found)
        if found is None:
            return None
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b or _reads_same(a, b)
    return bool(a == b)


def _reads_same(a: Any, b: Any) -> bool:
    """Two nodes that read one weight."""
    both = isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return both and a.op == b.op == "get_attr" and a.target == b.target
