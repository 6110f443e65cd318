"""`smelt recipes`: what ships with smelt, by family, or one recipe in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import columns, emit, waiting

if TYPE_CHECKING:
    from ..recipes import Header


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A shipped recipe, or a YAML file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="Change an option.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes, or print one in full.

    In full means with its includes spliced in and the changes of --set applied.

    \b
    smelt recipes
    smelt recipes all-four
    smelt recipes ./mine.yaml --set cache.encode.tail=128
    smelt recipes --json
    """
    from ..ir.errors import SmeltError

    if name is None and settings:
        raise SmeltError("--set changes one recipe: name it")
    with waiting("loading"):
        from ..passes import catalogue
        from ..recipes import FAMILIES, load, shipped

        if name is not None:
            recipe = load(name, catalogue(), settings or [])
        else:
            headers = shipped()
            states = {header.name: _state(header.name) for header in headers}
    if name is not None:
        emit({**recipe.to_dict(), "digest": recipe.digest()}) if json else print(recipe.to_yaml(), end="")
        return
    if json:
        emit([_plain(header, states[header.name]) for header in headers])
        return
    for family in FAMILIES:
        members = [header for header in headers if header.family == family]
        if members:
            print(family)
            print(columns([(h.name, h.does, _needs(h), states[h.name]) for h in members], indent="  "))


def _state(name: str) -> str:
    """`ready`, or why the recipe does not load."""
    from ..ir.errors import SmeltError
    from ..passes import catalogue
    from ..recipes import load

    try:
        load(name, catalogue())
    except SmeltError as fault:
        return f"does not load: {fault}"
    return "ready"


def _needs(header: Header) -> str:
    words = ["training"] if header.needs.training else []
    if header.needs.calibration != "none":
        words.append("calibration text" if header.needs.calibration == "text" else "calibration samples")
    words += ["a model that reads images"] if header.needs.images else []
    return f"needs {' and '.join(words)}" if words else "needs nothing"


def _plain(header: Header, state: str) -> dict[str, Any]:
    return {
        "name": header.name,
        "family": header.family,
        "does": header.does,
        "paper": vars(header.paper) if header.paper else None,
        "needs": vars(header.needs),
        "state": state,
    }
