"""Styles of export: which operators a graph may use, and what its inputs, outputs and further files are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from ...ir.errors import SmeltError, nearest
from ...ir.program import Program
from .builder import Builder, Value

# the module of this package that has the class of each style
STYLES = {"standard": ("standard", "Standard"), "ort": ("ort_style", "Ort")}


class Style(Protocol):
    """How a Program meets its runtime. Forms of ops are found by the style's name."""

    @property
    def name(self) -> str: ...

    def inputs(self, builder: Builder, program: Program) -> dict[str, Value]:
        """Make the graph's inputs; what the Program's own inputs are, by name."""
        ...

    def outputs(self, builder: Builder, program: Program, results: Mapping[str, Value]) -> None:
        """Make the graph's outputs from the Program's."""
        ...

    def manifest(self, builder: Builder, program: Program) -> dict[str, Any]:
        """What a caller must know to run the graph, for `smelt.json`."""
        ...

    def files(self, builder: Builder, program: Program, assets: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Files beside the model; `assets` are those of the tokenizer."""
        ...


def find_style(name: str, options: Mapping[str, Any]) -> Style:
    """The style of a name with its options; raises SmeltError for an unknown name or option."""
    if name not in STYLES:
        raise SmeltError(f"export: unknown style '{name}'{nearest(name, STYLES)}; known: {', '.join(STYLES)}")
    module, kind = STYLES[name]
    try:
        style: Style = getattr(importlib.import_module(f"{__package__}.{module}"), kind)(**options)
    except TypeError as fault:
        raise SmeltError(f"export: style {name} takes no such option ({fault})") from fault
    return style
