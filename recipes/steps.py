"""From the `steps:` of a recipe to passes: splices includes, names the steps, builds each pass from its options."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..passes import Pass
from .document import Node
from .options import Option, convert, hint, make, options_of, plain, values
from .schema import Gate, Step
from .words import shown

RESERVED: Mapping[str, Any] = {"optional": bool, "gate": Gate | None, "name": str}
STEP_NAME = r"[a-z][a-z0-9_-]*"
MAX_STEPS = 512


@dataclass(frozen=True)
class Draft:
    """A step as it is written, checked no further than the name of its pass.

    `name` is empty until one is given; `changes` are the overrides that touched it.
    """

    name: str
    pass_name: str
    options: Node
    changes: tuple[str, ...] = ()


def draft(steps: Node, catalogue: Mapping[str, type[Pass]], include: Callable[[Node], Sequence[Draft]]) -> list[Draft]:
    """The drafts of a list of steps; `include` yields those of the recipe that an `include:` names."""
    if not isinstance(steps.value, list):
        raise steps.fault(f"'steps' must be a list, but is {shown(steps)}")
    drafts: list[Draft] = []
    for item in steps.value:
        pass_name, options = _entry(item)
        drafts.extend(include(options) if pass_name == "include" else [_draft(pass_name, options, catalogue)])
        if len(drafts) > MAX_STEPS:
            raise item.fault(f"more than {MAX_STEPS} steps once includes are spliced in")
    return drafts


def named(drafts: Sequence[Draft]) -> list[Draft]:
    """The same drafts, each under a name of its own: the given one, the pass's, or the pass's with `#1`, `#2` …"""
    unnamed = Counter(item.pass_name for item in drafts if not item.name)
    count: Counter[str] = Counter()
    done: dict[str, Draft] = {}
    for item in drafts:
        name = item.name or item.pass_name
        if unnamed[name] > 1:
            count[name] += 1
            name = f"{name}#{count[name]}"
        if name in done:
            raise item.options.key_fault(f"a second step is named '{name}'; the first is at {done[name].options.key}")
        done[name] = dataclasses.replace(item, name=name)
    return list(done.values())


def build_step(item: Draft, catalogue: Mapping[str, type[Pass]]) -> Step:
    """The step of a named draft, every option checked against the pass."""
    cls, node = catalogue[item.pass_name], item.options
    given = values(cls, node, item.pass_name, also=RESERVED)
    extras = {
        name: convert(kind, node.value[name], f"'{name}' in {item.pass_name}")
        for name, kind in RESERVED.items()
        if name in node.value
    }
    what = f"{item.pass_name} (with {', '.join(item.changes)})" if item.changes else item.pass_name
    return Step(
        name=item.name,
        pass_name=item.pass_name,
        pass_=make(cls, given, node, what),
        options=_settings(pass_options(cls, item.pass_name), given, node),
        optional=extras.get("optional", False),
        gate=extras.get("gate"),
        place=re.sub(r"(:\d+):\d+$", r"\1", node.key),
    )


def pass_options(cls: type, pass_name: str) -> dict[str, Option]:
    """The options of a pass; refuses a pass whose fields hide a word that recipes reserve."""
    options = options_of(cls)
    if taken := sorted(set(options) & set(RESERVED)):
        raise TypeError(f"{pass_name}: recipes reserve the words {taken} for every step; rename these fields")
    return options


def _entry(item: Node) -> tuple[str, Node]:
    """A step's pass name and the mapping of its options, which carries the place of the pass's name as its key."""
    if isinstance(item.value, str):
        return item.value, Node({}, item.place, item.place)
    if not isinstance(item.value, dict) or not item.value:
        raise item.fault(
            f"a step is a pass's name, alone or as the one key over its options, but this is {shown(item)}"
        )
    if len(item.value) > 1:
        raise item.fault(
            f"a step is one pass, but this one has the keys {', '.join(item.value)}: "
            "indent options below their pass, and start each pass with '-'"
        )
    ((name, options),) = item.value.items()
    return name, options


def _draft(pass_name: str, options: Node, catalogue: Mapping[str, type[Pass]]) -> Draft:
    if pass_name not in catalogue:
        raise options.key_fault(f"unknown pass '{pass_name}'{hint(pass_name, [*catalogue, 'include'])}")
    if options.value is None:
        options = dataclasses.replace(options, value={})
    if not isinstance(options.value, dict):
        raise options.fault(f"the options of {pass_name} must be a mapping, but are {shown(options)}")
    given = options.value.get("name")
    name = convert(str, given, f"'name' in {pass_name}") if given else ""
    if given and not re.fullmatch(STEP_NAME, name):
        raise given.fault(f"a step's name is small letters, digits, - and _, but is {shown(given)}")
    return Draft(name, pass_name, options)


def _settings(options: Mapping[str, Option], given: Mapping[str, Any], node: Node) -> dict[str, Any]:
    """Every option as plain data, defaults included; a default without a plain form is left out."""
    settings = {}
    for name, option in options.items():
        try:
            settings[name] = plain(given.get(name, option.default))
        except ValueError:
            if name in given:
                settings[name] = node.value[name].plain()
    return settings
