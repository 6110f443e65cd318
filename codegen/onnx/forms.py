"""Which ONNX nodes stand for which op: one function an op, found by target and style."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import OPS, arguments
from ...ir.targets import target_name
from .builder import Builder, Value

Given: TypeAlias = Mapping[str, Any]  # by argument name: `Value` for tensors and sizes, else the plain argument
Made: TypeAlias = "str | Value | tuple[str, ...]"  # the name of the result, or names of several
Form: TypeAlias = Callable[[Builder, fx.Node, Given], Made]

STANDARD = "standard"
_FORMS: dict[tuple[str, str], Form] = {}


def form(*targets: str, style: str = STANDARD) -> Callable[[Form], Form]:
    """Register a function as the form of these ops (`smelt.linear`, `aten.add.Tensor`, …) in a style.

    Other styles use the standard form where they have none of their own.
    """

    def register(function: Form) -> Form:
        for target in targets:
            if (target, style) in _FORMS:
                raise ValueError(f"{target} has two forms in style {style}")
            _FORMS[target, style] = function
        return function

    return register


def write_node(builder: Builder, node: fx.Node, style: str, values: Mapping[fx.Node, Any]) -> Any:
    """The ONNX nodes of one call; returns its `Value`, or a tuple of them. Refuses an op without form."""
    _load()
    name = target_name(node.target)
    found = _FORMS.get((name, style)) or _FORMS.get((name, STANDARD))
    if found is None:
        raise SmeltError(
            f"{builder.name}: %{node.name} calls {name}, which has no ONNX form in style {style}; "
            "an encoder or decoder of the dialect's ops exports"
        )
    builder.scope = node.name
    made = found(builder, node, _given(node, values))
    shape, dtype = node.meta["shape"], node.meta["dtype"]
    if isinstance(made, tuple):
        return tuple(Value(n, s, d) for n, s, d in zip(made, shape, dtype, strict=True))
    return made if isinstance(made, Value) else Value(made, shape, dtype)


def standard(node: fx.Node) -> Form:
    """The standard form of a call, for a style whose own form does not cover it."""
    name = target_name(node.target)
    if (name, STANDARD) not in _FORMS:
        raise SmeltError(f"%{node.name} calls {name}, which has no ONNX form")
    return _FORMS[name, STANDARD]


def _given(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[str, Any]:
    named: dict[str, Any]
    if node.target in OPS or hasattr(node.target, "_schema"):
        given = arguments(node)
        named = {argument.name: given[argument.name] for argument in node.target._schema.arguments}  # type: ignore[union-attr]
    else:  # an operator of Python: its arguments have no names
        named = {str(at): value for at, value in enumerate(node.args)}
    return {name: fx.node.map_arg(value, lambda n: values[n]) for name, value in named.items()}


@functools.cache
def _load() -> None:
    """Import every module of this package whose name begins with `form_`, or with a style's name and `_form_`."""
    package = __package__ or ""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if "form_" in module.name:
            importlib.import_module(f"{package}.{module.name}")
