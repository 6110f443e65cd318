"""Types and values in words, for errors: `int | None` is "a whole number or null"."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from ..ir.encoding import Encoding
from .document import Node

_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "any value",
}


def wanted(kind: Any) -> str:
    """A type in words."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return wanted(args[0])
    if origin is Literal:
        return " or ".join(map(str, args))
    if len(choices(kind)) > 1:
        return " or ".join(map(wanted, args))
    if is_encoding(kind):
        return "an encoding"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(map(wanted, args))})"
    if origin in (list, tuple, Sequence, set, frozenset):
        return f"a list ({wanted(args[0])} each)"
    if origin in (dict, Mapping) or kind is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return getattr(kind, "__name__", str(kind))


def shown(node: Node) -> str:
    """A value as an error shows it: short, on one line."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "empty"
    text = json.dumps(node.value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union type, or the type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def literals(kind: Any) -> list[str]:
    """The words that a type spells out."""
    named = [choice for choice in choices(kind) if typing.get_origin(choice) is Literal]
    return [str(value) for choice in named for value in typing.get_args(choice)]


def is_encoding(kind: Any) -> bool:
    """Whether a type is an encoding of the ir, which has a recipe form of its own."""
    return isinstance(kind, type) and issubclass(kind, Encoding)
