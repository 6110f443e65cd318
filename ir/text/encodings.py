"""Encodings in the text form: `affine(bits=4, group=32, axis=token, zero=false, scale=float16)`, one in another too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..encoding import Encoding, parse
from ..errors import SmeltError
from .lexer import Reader
from .values import read_value, show_value

_BARE = re.compile(r"(?!(null|true|false|inf|nan)\b)[A-Za-z_]\w*", re.ASCII)


def show_encoding(encoding: Encoding) -> str:
    """One line that `read_encoding` reads back equal."""
    return _show_spec(encoding.spec())


def _show_spec(spec: Mapping[str, Any]) -> str:
    ((name, options),) = spec.items()
    return f"{name}({', '.join(f'{key}={_show_option(value)}' for key, value in options.items())})"


def _show_option(value: Any) -> str:
    if isinstance(value, Encoding):
        return show_encoding(value)
    if isinstance(value, Mapping):
        return _show_spec(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show_option, value))}]"
    return value if isinstance(value, str) and _BARE.fullmatch(value) else show_value(value)


def read_encoding(reader: Reader) -> Encoding:
    """The next encoding; raises SmeltError at its first token."""
    at = reader.peek().at
    spec = _read_spec(reader)
    try:
        return parse(spec)
    except (SmeltError, TypeError, ValueError, AttributeError, ArithmeticError) as fault:
        reader.fail(str(fault), at)


def _read_spec(reader: Reader) -> dict[str, dict[str, Any]]:
    name = reader.kind("word").text
    reader.expect("(")
    options: dict[str, Any] = {}
    for _ in reader.items(")"):
        option = reader.kind("word")
        if option.text in options:
            reader.fail(f"the option '{option.text}' stands here twice", option.at)
        reader.expect("=")
        options[option.text] = _read_option(reader)
    return {name: options}


def _read_option(reader: Reader) -> Any:
    token = reader.peek()
    if token.kind == "word" and reader.peek(1).text == "(":
        return _read_spec(reader)
    if token.kind == "word" and _BARE.fullmatch(token.text):
        return reader.next().text
    if reader.accept("["):
        return [_read_option(reader) for _ in reader.items("]")]
    return read_value(reader)
