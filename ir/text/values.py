"""Values in the text form: JSON, and besides it tuples, inf and nan, dtypes, nodes and weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..errors import SmeltError
from .lexer import Reader, Token

_WORDS: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "inf": math.inf,
    "nan": math.nan,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **{f"torch.{name}_format": getattr(torch, f"{name}_format") for name in ("contiguous", "preserve")},
    **{f"torch.{name}": getattr(torch, name) for name in ("channels_last", "channels_last_3d", "strided")},
}
_BARE = re.compile(r"\w+(\.\w+)*", re.ASCII)

Refer = Callable[[Token], fx.Node]


def show_value(value: Any) -> str:
    """One line that `read_value` reads back equal, type for type. Raises SmeltError for what has no text form."""
    if isinstance(value, fx.Node):
        return show_weight(str(value.target)) if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise SmeltError(f"has no text form: the key {strange[0]!r} is not a string")
        return "{" + ", ".join(f"{json.dumps(key)}: {show_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(show_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float) and not isinstance(value, torch.SymInt | torch.SymFloat):
        return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout) and str(value) in _WORDS:
        return str(value)
    raise SmeltError(f"has no text form: {value!r} of type {type(value).__name__}")


def show_weight(name: str) -> str:
    """`@model.norm.weight`, quoted where the name needs it."""
    return f"@{name if _BARE.fullmatch(name) else json.dumps(name)}"


def read_value(reader: Reader, refer: Refer | None = None) -> Any:
    """The next value; `refer` gives the node of a `%node` or `@weight` token, without it these are errors."""
    token = reader.next()
    if token.kind == "string":
        return reader.unquoted(token)
    if token.kind == "number":
        return _number(reader, token)
    if token.kind == "word" and token.text in _WORDS:
        return _WORDS[token.text]
    if token.kind in ("node", "weight") and refer is not None:
        return refer(token)
    match token.text:
        case "-" if reader.accept("inf"):
            return -math.inf
        case "-":
            return -_number(reader, reader.kind("number"))
        case "[":
            return [read_value(reader, refer) for _ in reader.items("]")]
        case "(":
            return tuple(read_value(reader, refer) for _ in reader.items(")"))
        case "{":
            return _mapping(reader, refer)
    reader.fail(f"expected a value, got '{token.text[:40]}'", token.at)


def read_mapping(reader: Reader) -> dict[str, Any]:
    """The next value, which must be a JSON object."""
    reader.expect("{")
    return _mapping(reader, None)


def _mapping(reader: Reader, refer: Refer | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in reader.items("}"):
        at = reader.peek().at
        key = reader.string()
        if key in found:
            reader.fail(f"the key '{key[:40]}' stands here twice", at)
        reader.expect(":")
        found[key] = read_value(reader, refer)
    return found


def _number(reader: Reader, token: Token) -> int | float:
    if not token.text.isdigit():
        return float(token.text)
    if len(token.text) > 4000:  # Python refuses to convert longer ones
        reader.fail(f"an integer of {len(token.text)} digits", token.at)
    return int(token.text)
