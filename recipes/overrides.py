"""Overrides from the command line: `--set cache.encode.tail=128` changes one option of one step."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from ..ir.errors import SmeltError
from ..passes import Pass
from .document import Node, from_data, parse
from .options import hint, plain
from .steps import Draft, pass_options


def override(drafts: Sequence[Draft], settings: Sequence[str], catalogue: Mapping[str, type[Pass]]) -> list[Draft]:
    """The drafts after each `<step or pass>.<option path>=<YAML value>`, in order; a later one wins."""
    changed = list(drafts)
    for text in settings:
        label = f"--set {text}"
        address, equals, value = text.partition("=")
        if not equals or not address:
            raise SmeltError(f"{label}: write it as <step>.<option>=<value>")
        at, path = _find(changed, address, label)
        data = parse(value, label).plain() if value.strip() else None
        changed[at] = _with(changed[at], path, _node(data, label), catalogue, label)
    return changed


def _find(drafts: Sequence[Draft], address: str, label: str) -> tuple[int, list[str]]:
    """Which draft an address means, by its own name or else by its pass's, and the rest of the address."""
    meant: dict[str, list[int]] = {}
    for at, item in enumerate(drafts):
        meant.setdefault(item.pass_name, []).append(at)
    meant.update({item.name: [at] for at, item in enumerate(drafts)})
    fits = [name for name in meant if f"{address}.".startswith(f"{name}.")]
    if not fits:
        head = address.rpartition(".")[0] or address
        raise SmeltError(f"{label}: no step '{head}' in this recipe{hint(head, meant)}")
    name = max(fits, key=len)
    if len(meant[name]) > 1:
        own = ", ".join(drafts[at].name for at in meant[name])
        raise SmeltError(f"{label}: {len(meant[name])} steps run {name}; write one of {own} in its place")
    path = address[len(name) + 1 :]
    if not path:
        raise SmeltError(f"{label}: '{name}' is a step; name the option too, as {name}.<option>=<value>")
    return meant[name][0], path.split(".")


def _with(item: Draft, path: Sequence[str], value: Node, catalogue: Mapping[str, type[Pass]], label: str) -> Draft:
    options = pass_options(catalogue[item.pass_name], item.pass_name)
    first, known = path[0], [*options, "optional", "gate"]
    if first == "name":
        raise SmeltError(f"{label}: a step is named in the recipe; nothing else would change")
    if first not in known:
        raise SmeltError(f"{label}: unknown key '{first}' in {item.pass_name}{hint(first, known)}")
    start = item.options
    if len(path) > 1 and first not in start.value and first in options and not options[first].required:
        # a part of an option that the recipe leaves at its default
        start = _put(start, path[:1], _node(plain(options[first].default), label), label)
    changed = dataclasses.replace(_put(start, path, value, label), place=item.options.place)
    return dataclasses.replace(item, options=changed, changes=(*item.changes, label))


def _put(node: Node, path: Sequence[str], value: Node, label: str) -> Node:
    """A copy of `node` with `value` at `path`, all on the way placed at `label`; missing mappings are made."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if node.value is None or isinstance(node.value, dict):
        inner = dict(node.value or {})
        inner[head] = _put(inner.get(head, _node(None, label)), rest, value, label)
        return dataclasses.replace(node, value=inner, place=label)
    if not isinstance(node.value, list):
        raise SmeltError(f"{label}: '{head}' would lie within a single value; set the whole option")
    if not re.fullmatch(r"[0-9]{1,9}", head) or int(head) >= len(node.value):
        raise SmeltError(f"{label}: '{head}' is no place in a list of {len(node.value)}, counted from 0")
    items = list(node.value)
    items[int(head)] = _put(items[int(head)], rest, value, label)
    return dataclasses.replace(node, value=items, place=label)


def _node(data: object, label: str) -> Node:
    return from_data(data, lambda path: label)
