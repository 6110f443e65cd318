"""Prints a Program: one line a node, weights by shape, encoding and hash. `parser.py` reads it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from ..errors import SmeltError
from ..program import Program, Record
from ..targets import target_name
from ..weight import Weight
from .encodings import show_encoding
from .types import show_type
from .values import show_value, show_weight

VERSION = 1
HASH_DIGITS = 12
_digests: WeakKeyDictionary[Weight, str] = WeakKeyDictionary()  # a weight is a value, and hashing reads all of it


def print_program(program: Program, hashes: bool = True) -> str:
    """The text of a Program. The same Program gives the same text.

    `hashes=False` leaves the content hashes of weights out, for a quick look at a large model. Raises SmeltError
    naming the node or entry that has no text form.
    """
    return "\n".join(_lines(program, hashes)) + "\n"


def content_hash(weight: Weight) -> str:
    """The first digits of the weight's digest, computed once for each weight."""
    if weight not in _digests:
        _digests[weight] = weight.digest()[:HASH_DIGITS]
    return _digests[weight]


def _lines(program: Program, hashes: bool) -> Iterator[str]:
    yield f"smelt {VERSION}"
    yield f"program {show_value(program.name)}"
    if program.facts:
        yield "facts " + _table(program.facts, "facts")
    if program.cache is not None:
        yield "cache ["
        yield from (f"  {_shown(site, 'cache plan')}," for site in program.cache.to_dict()["sites"])
        yield "]"
    if program.decode is not None:
        yield f"decode {_shown(program.decode.to_dict(), 'decode plan')}"
    if program.choice is not None:
        yield f"choice {_shown(program.choice.to_dict(), 'choice plan')}"
    if program.depth is not None:
        yield f"depth {_shown(program.depth.to_dict(), 'depth plan')}"
    yield from _history(program.history, program.origin)
    yield "weights {"
    for name, weight in program.weights.items():
        tail = f" #{content_hash(weight)}" if hashes else ""
        yield f"  {show_weight(name)}: {list(weight.shape)} {show_encoding(weight.encoding)}{tail}"
    yield "}"
    yield "graph {"
    yield from (f"  {line}" for node in program.graph.nodes if (line := _within(node)))
    yield "}"


def _table(data: Mapping[str, Any], place: str) -> str:
    rows = [f"  {_shown({key: value}, place)[1:-1]}," for key, value in data.items()]
    return "\n".join(["{", *rows, "}"])


def _history(history: tuple[Record, ...], origin: Mapping[str, Record]) -> Iterator[str]:
    for record in history:
        place = f"history, {record}"
        changed = sorted(name for name, by in origin.items() if (by.step, by.name) == (record.step, record.name))
        text = f"step {_shown(record.step, place)} {_shown(record.name, place)} {_shown(record.options, place)}"
        yield f"{text} {_shown(record.report, place)}" + (f" changed {_shown(changed, place)}" if changed else "")


def _within(node: fx.Node) -> str | None:
    try:
        return _node(node)
    except SmeltError as fault:
        raise SmeltError(f"%{node.name}: {fault}") from fault


def _node(node: fx.Node) -> str | None:
    if node.op == "get_attr":
        return None  # a weight is written where it is used
    if node.op == "output":
        return f"return {show_value(node.args[0])}"
    type_ = show_type(node.meta)
    head = f"%{node.name}: {type_}" if type_ else f"%{node.name}"
    if node.op == "placeholder":
        return f"{head} = input({show_value(node.target)})"
    if node.op != "call_function":
        raise SmeltError(f"a node of kind {node.op} has no text form")
    arguments = [*map(show_value, node.args), *(f"{key}={show_value(value)}" for key, value in node.kwargs.items())]
    return f"{head} = {target_name(node.target)}({', '.join(arguments)})"


def _shown(value: Any, place: str) -> str:
    try:
        return show_value(value)
    except SmeltError as fault:
        raise SmeltError(f"{place}: {fault}") from fault
