"""YAML text as plain data in which every part remembers where it was written, so that an error can name its place.

The scalars follow YAML 1.2: `on` is a word, `1e-3` a number and `2024-01-01` text. Nothing but plain data is ever
built: tags are refused, and size, depth and the number of parts (aliases count whenever they are used) are bounded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from ..ir.errors import SmeltError

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_PARTS = 20_000

_NUMBER = list("-+.0123456789")
_SCALARS: tuple[tuple[str, str, list[str]], ...] = (  # tag, pattern, first characters; the core schema of YAML 1.2
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", _NUMBER),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?)$", _NUMBER),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", _NUMBER),
)
_TAG = "tag:yaml.org,2002:"


class _Reader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = parent.start_mark if parent else None
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH}", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Writer(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Reader, _Writer):  # both sides alike, so that what is written reads back the same
    _side.yaml_implicit_resolvers = {}
    for _name, _pattern, _first in _SCALARS:
        _side.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
_Writer.add_implicit_resolver(_TAG + "merge", re.compile("^<<$"), ["<"])  # so that a word << is written in quotes


@dataclass(frozen=True)
class Node:
    """A value, the place it stands, and the place of its key (its own place outside a mapping).

    `value` is None, bool, int, float, str, a list of nodes or a dict from text to nodes.
    """

    value: Any
    place: str
    key: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def fault(self, message: str) -> SmeltError:
        """An error at this value, to be raised."""
        return SmeltError(f"{self.place}: {message}")

    def key_fault(self, message: str) -> SmeltError:
        """An error at this value's key, to be raised."""
        return SmeltError(f"{self.key}: {message}")


def parse(text: str, label: str) -> Node:
    """Read one YAML document; `label` is the file's name in errors. Raises SmeltError for anything but plain data."""
    if len(text) > MAX_BYTES:
        raise SmeltError(f"{label}: larger than {MAX_BYTES} bytes, which no recipe is")
    try:
        root = yaml.compose(text, Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SmeltError(f"{_at(label, mark)}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"{label}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise SmeltError(f"{place}: not valid YAML: character {error.character:#x} is not allowed") from None
    except (ValueError, OverflowError):  # an escape such as "\U99999999" beyond the last character
        raise SmeltError(f"{label}:1:1: not valid YAML: an escape names no character") from None
    if root is None:
        raise SmeltError(f"{label}:1:1: empty")
    return _Walk(label).node(root, None, 0)


def from_data(value: Any, place: Callable[[str], str]) -> Node:
    """Plain Python data as nodes; `place` turns a path such as `steps[0].bits` into a place. Refuses other objects."""
    left = [MAX_PARTS]

    def walk(value: Any, path: str, depth: int) -> Node:
        here = place(path)
        left[0] -= 1
        if depth > MAX_DEPTH or left[0] < 0:
            raise SmeltError(f"{here}: nested deeper than {MAX_DEPTH}, or more than {MAX_PARTS} parts")
        if isinstance(value, Mapping):
            named = {}
            for key, child in value.items():
                name = str(key)
                if name in named:
                    raise SmeltError(f"{here}: duplicate key '{name}'")
                named[name] = walk(child, f"{path}.{name}" if path else name, depth + 1)
            return Node(named, here, here)
        if isinstance(value, list | tuple):
            return Node([walk(child, f"{path}[{i}]", depth + 1) for i, child in enumerate(value)], here, here)
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return Node(kind(value), here, here)
        if value is None:
            return Node(None, here, here)
        raise SmeltError(f"{here}: a recipe holds plain data, not a {type(value).__name__}; write it as in a YAML file")

    return walk(value, "", 0)


def dump(data: Any) -> str:
    """Plain data as YAML text that `parse` reads back equal; keys keep their order."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


class _Walk:
    """Turns a composed YAML document into nodes, within the bounds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.left = MAX_PARTS

    def node(self, raw: yaml.Node, key: yaml.Node | None, depth: int) -> Node:
        place = _at(self.label, raw.start_mark)
        self.left -= 1
        if self.left < 0:
            raise SmeltError(f"{place}: more than {MAX_PARTS} parts once aliases are expanded")
        if depth > MAX_DEPTH:
            raise SmeltError(f"{place}: nested deeper than {MAX_DEPTH}, or an alias that contains itself")
        return Node(self.value(raw, place, depth), place, _at(self.label, key.start_mark) if key else place)

    def value(self, raw: yaml.Node, place: str, depth: int) -> Any:
        kind = raw.tag.removeprefix(_TAG)
        if isinstance(raw, yaml.MappingNode) and kind == "map":
            return self.mapping(raw, depth)
        if isinstance(raw, yaml.SequenceNode) and kind == "seq":
            return [self.node(child, None, depth + 1) for child in raw.value]
        if isinstance(raw, yaml.ScalarNode) and kind in _BUILD:
            try:
                raw.value.encode()  # refuses half a surrogate pair, which "\ud800" would make
                return _BUILD[kind](raw.value)
            except (ValueError, KeyError):
                raise SmeltError(f"{place}: not a value of type {kind}: {raw.value[:40]!r}") from None
        raise SmeltError(f"{place}: tag '{kind}' is not allowed; a recipe holds plain data")

    def mapping(self, raw: yaml.MappingNode, depth: int) -> dict[str, Node]:
        named: dict[str, Node] = {}
        for key, child in raw.value:
            place = _at(self.label, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise SmeltError(f"{place}: a key must be a word, not a list or mapping")
            if key.value == "<<" and key.style is None:  # in quotes it is a word like any other
                raise SmeltError(f"{place}: merge keys (<<) are not supported; write the keys out")
            if key.value in named:
                raise SmeltError(f"{place}: duplicate key '{key.value}', first at {named[key.value].key}")
            named[key.value] = self.node(child, key, depth + 1)
        return named


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_BUILD: Mapping[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": _integer,
    "float": _real,
    "str": str,
}


def _at(label: str, mark: yaml.Mark | None) -> str:
    return f"{label}:{mark.line + 1}:{mark.column + 1}" if mark else f"{label}:1:1"
