"""The JSON schema with which editors complete and check recipes, made from the header's classes and the passes.

`python -m smelt.recipes` writes it to recipe.schema.json beside this file; a test holds the two together.
"""

import contextlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from ..passes import Pass
from .options import Option, adapter, dataclass_each, dataclass_in, dataclass_under, options_of, plain
from .schema import Header
from .steps import RESERVED, STEP_NAME, pass_options

FILE = "recipe.schema.json"
Schema = dict[str, Any]

_FIELD = re.compile(r"^( *)(?:[-*] )?`?(\w+)`?(?: \([^)\n]*\))?: +(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
_RESERVED_DOCS = {
    "optional": "Whether the pass may match nothing.",
    "gate": "What the step may cost before it is undone.",
    "name": "A name by which --set can address the step.",
}


def json_schema(catalogue: Mapping[str, type[Pass]]) -> Schema:
    """The schema of a recipe file, given every pass by name."""
    defs: Schema = {}
    steps = {name: _step(cls, name, defs) for name, cls in sorted(catalogue.items())}
    bare = [name for name, cls in sorted(catalogue.items()) if not _required(options_of(cls))]
    include = {"type": "string", "description": "A recipe by name or relative path; its steps stand here."}
    step = {
        "type": "object",
        "properties": {"include": include, **steps},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    recipe = _object(Header, defs)
    recipe["properties"]["steps"] = {
        "type": "array",
        "items": {"anyOf": [step, {"enum": bare, "description": "A pass with its defaults."}]},
        "description": "Passes with their options, in the order in which they run.",
    }
    recipe["required"] = [*recipe["required"], "steps"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "smelt recipe"}
    return {**head, **recipe, **({"$defs": dict(sorted(defs.items()))} if defs else {})}


def to_text(schema: Schema) -> str:
    """The schema as the file holds it."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def documented(cls: type) -> dict[str, str]:
    """What docstrings say of each field: `name: text`, lines that are indented deeper going on with it.

    What a class inherits is told by the class that it comes from, unless its own docstring tells it anew.
    """
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__doc__ or "")
        for match in _FIELD.finditer(text):
            found[match[2]] = " ".join(match[3].split())
    return found


def _step(cls: type, name: str, defs: Schema) -> Schema:
    options = pass_options(cls, name)
    schema = _object(cls, defs)
    for word, kind in RESERVED.items():
        schema["properties"][word] = {**_kind(kind, defs), "description": _RESERVED_DOCS[word]}
    schema["properties"]["name"]["pattern"] = f"^{STEP_NAME}$"
    schema["type"] = "object" if _required(options) else ["object", "null"]
    return schema


def _object(cls: type, defs: Schema) -> Schema:
    """The schema of a dataclass: its options with types, defaults and what its docstring says of them."""
    options, docs = options_of(cls), documented(cls)
    first = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
    schema: Schema = {
        "type": "object",
        "description": " ".join(first.split()),
        "properties": {name: _property(option, docs, defs) for name, option in options.items()},
        "additionalProperties": False,
    }
    return {**schema, "required": required} if (required := _required(options)) else schema


def _property(option: Option, docs: Mapping[str, str], defs: Schema) -> Schema:
    schema = _kind(option.type, defs)
    if option.name in docs:
        schema["description"] = docs[option.name]
    if not option.required:
        with contextlib.suppress(ValueError):  # a default without a plain form
            schema["default"] = plain(option.default)
    return schema


def _kind(kind: Any, defs: Schema) -> Schema:
    """The schema of an annotated type, with its parts in `defs`."""
    if cls := dataclass_in(kind):
        schema = _object(cls, defs)
        return schema if cls is kind else {"anyOf": [schema, {"type": "null"}]}
    if cls := dataclass_under(kind):
        return {"type": "object", "additionalProperties": _object(cls, defs)}
    if cls := dataclass_each(kind):
        return {"type": "array", "items": _object(cls, defs)}
    schema = adapter(kind).json_schema()
    defs.update(schema.pop("$defs", {}))
    return schema


def _required(options: Mapping[str, Option]) -> list[str]:
    return [name for name, option in options.items() if option.required]
