"""Loads recipes: from the package by name, from a file by path, or from a dict; and lists those of the package."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..ir.errors import SmeltError, nearest
from ..passes import Pass
from .document import MAX_BYTES, Node, from_data, parse
from .options import convert, make, values
from .overrides import override
from .schema import Header, Needs, Recipe
from .steps import Draft, build_step, draft, named

WITHOUT_PAPER = ("baseline", "deploy")
MAX_INCLUDES = 16


@dataclass(frozen=True)
class _Source:
    """A recipe as it is written, the name of its file, the folder where its includes start, and what tells it apart."""

    document: Node
    label: str
    folder: Traversable
    identity: str
    shipped_as: str = ""


def load(
    source: str | Path | Mapping[str, Any], catalogue: Mapping[str, type[Pass]], overrides: Sequence[str] = ()
) -> Recipe:
    """The recipe that `source` names, resolved and checked.

    source: a recipe that ships with smelt, by name; a file, by a Path or a text that ends in .yaml or holds a slash; or
        the recipe itself as plain data.
    catalogue: every pass by name, each a frozen dataclass whose fields are its options.
    overrides: `<step or pass>.<option path>=<YAML value>` each.
    Raises SmeltError with file, line and column for the first fault.
    """
    header, drafts = _resolve(_open(source), catalogue, ())
    steps = tuple(build_step(item, catalogue) for item in override(named(drafts), overrides, catalogue))
    own = {field.name: getattr(header, field.name) for field in dataclasses.fields(Header)}
    for step in steps:  # a pass knows what it needs, whatever the header says
        own["needs"] = own["needs"].union(Needs(calibration=step.pass_.calibration))
    return Recipe(**own, steps=steps)


def shipped() -> tuple[Header, ...]:
    """The header of every recipe that ships with smelt, by family and name. Reads no steps, hence needs no passes."""
    headers = [_header(_open(name)) for name in _names()]
    return tuple(sorted(headers, key=lambda header: (header.family, header.name)))


def _resolve(
    source: _Source, catalogue: Mapping[str, type[Pass]], chain: tuple[_Source, ...]
) -> tuple[Header, list[Draft]]:
    """A recipe's header, with what its includes need as well, and its drafts with theirs in place."""
    header = _header(source)
    chain = (*chain, source)
    needs = header.needs

    def include(node: Node) -> list[Draft]:
        nonlocal needs
        name = convert(str, node, "'include'")
        try:
            inner = _named(name, source.folder, source.label)
        except SmeltError as error:
            raise node.fault(str(error)) from None
        if inner.identity in [each.identity for each in chain]:
            trail = " → ".join(os.path.basename(each.label) for each in (*chain, inner))
            raise node.fault(f"include cycle: {trail}")
        if len(chain) > MAX_INCLUDES:
            raise node.fault(f"includes deeper than {MAX_INCLUDES}")
        other, drafts = _resolve(inner, catalogue, chain)
        needs = needs.union(other.needs)
        return drafts

    drafts = draft(source.document.value["steps"], catalogue, include)
    return dataclasses.replace(header, needs=needs), drafts


def _header(source: _Source) -> Header:
    """The checked header; that there are steps is checked, what they say is not."""
    document = source.document
    given = values(Header, document, "the recipe", also=("steps",))
    if "steps" not in document.value:
        raise document.fault("the recipe lacks 'steps' (a list of passes)")
    header: Header = make(Header, given, document, "the recipe")
    if source.shipped_as and header.name != source.shipped_as:
        raise document.value["name"].fault(f"'name' must be '{source.shipped_as}', as the file is called")
    if source.shipped_as and not header.paper and header.family not in WITHOUT_PAPER:
        raise document.fault(f"a recipe of the family {header.family} that ships with smelt must cite its 'paper'")
    return header


def _open(source: str | Path | Mapping[str, Any]) -> _Source:
    if isinstance(source, Mapping):
        document = from_data(source, lambda path: f"<dict>:{path}" if path else "<dict>")
        return _Source(document, "<dict>", Path(), "<dict>")
    if isinstance(source, Path):
        return _read(source, str(source))
    return _named(source, Path(), "")


def _named(name: str, folder: Traversable, beside: str) -> _Source:
    """The shipped recipe of this name, or the file that the text leads to from `folder`; `beside` is who names it."""
    if name.endswith((".yaml", ".yml")) or "/" in name or os.sep in name:
        return _read(folder.joinpath(name), os.path.normpath(os.path.join(os.path.dirname(beside), name)))
    known = _names()
    if name not in known:
        raise SmeltError(f"no recipe '{name}'{nearest(name, known)}; a file is named by a path that ends in .yaml")
    return dataclasses.replace(_read(_home().joinpath(f"{name}.yaml"), f"{name}.yaml"), shipped_as=name)


def _read(file: Traversable, label: str) -> _Source:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)  # no more of it is in memory, whatever the file
    except OSError as error:
        raise SmeltError(f"{label}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise SmeltError(f"{label}: larger than {MAX_BYTES} bytes, which no recipe is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SmeltError(f"{label}: not UTF-8 text (byte {error.start})") from None
    folder = file.parent if isinstance(file, Path) else _home()
    identity = str(file.resolve()) if isinstance(file, Path) else str(file)
    return _Source(parse(text, label), label, folder, identity)


def _names() -> list[str]:
    return sorted(item.name.removesuffix(".yaml") for item in _home().iterdir() if item.name.endswith(".yaml"))


def _home() -> Traversable:
    return files(__package__)
