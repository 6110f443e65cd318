"""Builds a frozen dataclass from a part of a recipe: unknown, missing and ill-typed options are errors at their place.

Passes and the parts of a recipe's header (paper, gate, bound, …) all go through here. Values are held strictly to the
field's type: `4` is a number but not text, `"4"` is text but not a number, a whole number will do for a real one.
"""

import dataclasses
import json
import typing
from collections.abc import Collection, Mapping
from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema

from ..ir.encoding import catalogue, parse
from ..ir.errors import SmeltError, nearest
from .document import Node
from .words import choices, is_encoding, literals, shown, wanted


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a dataclass: its name, its type with extras, and its default (MISSING when it must be given)."""

    name: str
    type: Any
    default: Any

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is dataclasses.MISSING


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass: the fields that its constructor takes, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            found[field.name] = Option(field.name, hints[field.name], default)
    return found


def values(cls: type, node: Node, what: str, also: Collection[str] = ()) -> dict[str, Any]:
    """The given options of `cls` in the types of its fields; `what` names it in errors, keys in `also` are skipped."""
    if not isinstance(node.value, dict):
        raise node.fault(f"{what} must be a mapping, but is {shown(node)}")
    options = options_of(cls)
    for name, child in node.value.items():
        if name not in options and name not in also:
            raise child.key_fault(f"unknown key '{name}' in {what}{hint(name, [*options, *also])}")
    for option in options.values():
        if option.required and option.name not in node.value:
            raise node.key_fault(f"{what} lacks '{option.name}' ({wanted(option.type)})")
    return {
        name: convert(options[name].type, child, f"'{name}' in {what}")
        for name, child in node.value.items()
        if name in options
    }


def make(cls: type, given: Mapping[str, Any], node: Node, what: str) -> Any:
    """An instance of `cls`; what its own checks refuse becomes an error at the node."""
    try:
        return cls(**given)
    except (ValueError, SmeltError) as error:
        raise node.key_fault(f"{what}: {error}") from None


def convert(kind: Any, node: Node, what: str) -> Any:
    """The node's value as the annotated type `kind`; `what` names it in errors."""
    if cls := dataclass_in(kind):
        if node.value is None and cls is not kind:
            return None
        return make(cls, values(cls, node, what), node, what)
    if (cls := dataclass_under(kind)) and isinstance(node.value, dict):
        return {name: convert(cls, child, f"'{name}' in {what}") for name, child in node.value.items()}
    if (cls := dataclass_each(kind)) and isinstance(node.value, list):
        return tuple(convert(cls, child, f"{what}[{at}]") for at, child in enumerate(node.value))
    try:
        # JSON is the strict mode that fits YAML: lists become tuples, but text never becomes a number
        return adapter(kind).validate_json(json.dumps(node.plain()), strict=True)
    except ValidationError as error:
        raise _explain(error, kind, node, what) from None


def dataclass_in(kind: Any) -> type | None:
    """The dataclass that `kind` is, alone or with None."""
    found = [choice for choice in choices(kind) if choice is not type(None)]
    fits = len(found) == 1 and isinstance(found[0], type) and dataclasses.is_dataclass(found[0])
    return found[0] if fits and not is_encoding(found[0]) else None


def dataclass_under(kind: Any) -> type | None:
    """The dataclass of the values of a mapping type."""
    under = typing.get_args(kind)[1:] if typing.get_origin(kind) in (dict, Mapping) else ()
    return dataclass_in(under[0]) if under else None


def dataclass_each(kind: Any) -> type | None:
    """The dataclass of the entries of a list type."""
    entries = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    return dataclass_in(entries[0]) if len(entries) == 2 and entries[1] is Ellipsis else None


def adapter(kind: Any) -> TypeAdapter[Any]:
    """Pydantic's view of a type in which encodings are read from their recipe form and nothing is silently dropped."""
    return TypeAdapter(_readable(kind), config=ConfigDict(extra="forbid"))


def plain(value: Any) -> Any:
    """A value as it could stand in YAML: lists and dicts, encodings in their recipe form. ValueError for others."""
    if is_encoding(type(value)):
        return plain(value.spec())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in options_of(type(value))}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(f"a {type(value).__name__} has no plain form")


def hint(word: str, known: Collection[str]) -> str:
    """The nearest known name, or the known ones (a dozen at most) when nothing is near."""
    names = list(known)
    return nearest(word, names) or f" (known: {', '.join(names[:12]) or 'none'}{', …' if len(names) > 12 else ''})"


def _readable(kind: Any) -> Any:
    if is_encoding(kind):
        return Annotated[Any, PlainValidator(_encoding), WithJsonSchema(_form())]
    args = typing.get_args(kind)
    if not any(map(is_encoding, _leaves(kind))):
        return kind
    if len(choices(kind)) > 1:
        return typing.Union[tuple(map(_readable, args))]  # noqa: UP007  (built from a tuple)
    return typing.get_origin(kind)[tuple(map(_readable, args))]


@cache
def _form() -> dict[str, Any]:
    """The JSON schema of an encoding: its printed form, or one name with options."""
    named = {name: {"description": (cls.__doc__ or "").partition("\n")[0]} for name, cls in catalogue().items()}
    form = {"type": ["object", "string"], "minProperties": 1, "maxProperties": 1}
    return {**form, "properties": named, "additionalProperties": False}


def _leaves(kind: Any) -> list[Any]:
    return [leaf for arg in typing.get_args(kind) for leaf in _leaves(arg)] or [kind]


def _encoding(spec: Any) -> Any:
    if not isinstance(spec, dict | str) or not spec:
        raise ValueError("an encoding is one name with its options, such as {dense: float16}")
    try:
        return parse(spec)
    except (SmeltError, TypeError) as error:
        raise ValueError(str(error)) from None


def _explain(error: ValidationError, kind: Any, node: Node, what: str) -> SmeltError:
    """One line for pydantic's findings, at the innermost part of the value that they name."""
    found = sorted(error.errors(), key=lambda each: each["type"] != "value_error")
    first, where, trail = found[0], node, ""
    for part in first["loc"]:
        if isinstance(where.value, dict) and part in where.value:
            where, trail = where.value[part], f"{trail}.{part}"
        elif isinstance(where.value, list) and isinstance(part, int) and part < len(where.value):
            where, trail = where.value[part], f"{trail}[{part}]"
    if "ctx" in first and first["type"] not in ("literal_error", "enum"):
        at = f", at {trail.lstrip('.')}" if trail else ""
        return where.fault(f"{what}{at}: {first['msg'].removeprefix('Value error, ')}")
    near = nearest(where.value, literals(kind)) if isinstance(where.value, str) else ""
    inner = f"its part {trail.lstrip('.')} is {shown(where)}" if trail else f"is {shown(where)}"
    return where.fault(f"{what} must be {wanted(kind)}, but {inner}{near}")
