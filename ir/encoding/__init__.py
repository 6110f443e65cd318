"""Encodings: how weights, caches and deltas are stored. `parse` reads the recipe form and the printed form."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import SmeltError, nearest
from .affine import Affine
from .base import Encoding, Parts
from .bitmap import Bitmap
from .channel_scaled import ChannelScaled
from .codebook import Codebook
from .dense import Dense
from .low_rank import LowRank
from .masked import Masked
from .nm import NM
from .nonuniform import Nonuniform
from .rotated import Rotated
from .sign import Sign
from .sparse import Sparse
from .sum import Sum
from .tiered import Tiered

__all__ = [
    "NM", "Affine", "Bitmap", "ChannelScaled", "Codebook", "Dense", "Encoding", "LowRank", "Masked", "Nonuniform",
    "Parts", "Rotated", "Sign", "Sparse", "Sum", "Tiered", "catalogue", "parse",
]  # fmt: skip


@functools.cache
def catalogue() -> dict[str, type[Encoding]]:
    """Every encoding by name: the concrete classes found in this package, one a file."""
    found: dict[str, type[Encoding]] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, Encoding) and not inspect.isabstract(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def parse(spec: Mapping[str, Any] | str) -> Encoding:
    """An encoding from `{affine: {bits: 4, group: 64}}`, `{dense: float16}` or the printed `affine(bits=4, group=64)`.

    A plain value instead of options is the first option. Raises SmeltError naming the encoding, the option and the
    nearest known name.
    """
    if isinstance(spec, str):
        spec = _read(spec)
    if len(spec) != 1:
        raise SmeltError(f"an encoding is one name with its options, such as {{dense: float16}}, not {dict(spec)!r}")
    (name, options), known = next(iter(spec.items())), catalogue()
    if name not in known:
        raise SmeltError(f"unknown encoding '{name}'{nearest(str(name), known)}; known: {', '.join(known)}")
    signature = inspect.signature(known[name])
    if not isinstance(options, Mapping):
        options = {} if options is None else {next(iter(signature.parameters)): options}
    for option in options:
        if option not in signature.parameters:
            hint = nearest(str(option), signature.parameters)
            raise SmeltError(f"{name}: unknown option '{option}'{hint}; known: {', '.join(signature.parameters)}")
    for option, parameter in signature.parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise SmeltError(f"{name}: the option '{option}' is missing")
    inner = {field.name for field in dataclasses.fields(known[name]) if "Encoding" in str(field.type)}
    return known[name](**{option: _inner(v) if option in inner else _frozen(v) for option, v in options.items()})


def _inner(value: Any) -> Any:
    """The value of an option that takes an encoding, or a list of them."""
    if isinstance(value, list | tuple):
        return tuple(map(_inner, value))
    return parse(value) if isinstance(value, Mapping | str) else value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _read(text: str) -> dict[str, Any]:
    """The printed form as the recipe form; words without quotes are strings."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        value = _value(node)
    except (SyntaxError, ValueError) as error:
        raise SmeltError(f"cannot read the encoding '{text}'; write it as affine(bits=4, group=64)") from error
    return value if isinstance(value, dict) else {str(value): None}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=options):
            return {name: {str(option.arg): _value(option.value) for option in options}}
        case ast.Call(func=ast.Name(id=name), args=[only], keywords=[]):
            return {name: _value(only)}
        case ast.Name(id=word):
            return word
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case _:
            return ast.literal_eval(node)
