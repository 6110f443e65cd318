"""What an ONNX op means: a Python function over torch tensors, registered by domain, name and version.

    @op("Gemm", since=7)
    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, …) -> Tensor:

Inputs are positional (None or the default where one is absent), attributes are keywords by their ONNX names; one that
the function does not take refuses the node. The annotation of an input says what the function wants to be given:
`Tensor`; `Ints`, numbers known while tracing (shapes, axes); `Number`, one of them; `Operand`, a number where the input
is a known scalar and a tensor otherwise; `Value`, anything, as it is. An attribute annotated `DType` comes as a torch
type, one annotated `Kind` with ONNX's number of it beside, one annotated `Body` as a callable graph. A keyword
`outputs` is given the number of outputs asked for.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...errors import SmeltError, nearest

F = TypeVar("F", bound=Callable[..., Any])
Tensor = torch.Tensor
Ints = tuple[int, ...]
Number = float
Operand = torch.Tensor | float
Value = Any
DType = torch.dtype


@dataclass(frozen=True)
class Kind:
    """An element type: ONNX's number for it, and the torch type that holds it."""

    number: int
    dtype: torch.dtype


Body = Callable[..., tuple[Any, ...]]

TENSOR, INTS, NUMBER, OPERAND, VALUE = "tensor", "ints", "number", "operand", "value"
_KINDS: dict[Any, str] = {Tensor: TENSOR, Ints: INTS, Number: NUMBER, Operand: OPERAND, Value: VALUE}
STANDARD = ""  # the domain of ONNX itself; "ai.onnx" is another name for it
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Rule:
    """One registered function, and what it wants to be given."""

    name: str
    since: int
    function: Callable[..., Any]
    inputs: tuple[str, ...]  # a kind for each positional parameter
    required: int
    rest: str | None  # the kind of `*inputs`
    attributes: dict[str, Any]  # annotation by name
    counts_outputs: bool


_RULES: dict[tuple[str, str], list[Rule]] = {}


def op(*names: str, since: int = 1, domain: str = STANDARD) -> Callable[[F], F]:
    """Registers a function for ops of one meaning, from version `since` of their own on."""

    def register(function: F) -> F:
        for name in names:
            held = _RULES.setdefault((domain, name), [])
            held.append(_rule(name, since, function))
            held.sort(key=lambda rule: rule.since)
        return function

    return register


def find(domain: str, name: str, version: int) -> Rule | None:
    """The function for an op whose meaning was last changed in `version`, or None."""
    return next((rule for rule in reversed(_RULES.get((domain, name), [])) if rule.since <= version), None)


def known_ops(domain: str = STANDARD) -> list[str]:
    """Names with a function of their own."""
    return sorted(name for where, name in _RULES if where == domain)


def refusal(domain: str, name: str) -> str:
    """What to say of an op that no function is registered for."""
    if domain not in {where for where, _ in _RULES}:
        return f"the domain '{domain}' is unknown; smelt reads standard ONNX and com.microsoft ops"
    if (domain, name) in _RULES:
        return (
            f"the op {name} meant something else in this old opset, which is not read; "
            "convert the file with onnx.version_converter.convert_version(model, 18)"
        )
    return f"the op {f'{domain}.' * bool(domain)}{name} cannot be imported yet{nearest(name, known_ops(domain))}"


def _rule(name: str, since: int, function: Callable[..., Any]) -> Rule:
    hints = typing.get_type_hints(function)
    inputs, attributes, rest, required = [], dict[str, Any](), None, 0
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if parameter.kind is parameter.KEYWORD_ONLY:
            attributes[parameter.name] = hint
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = _kind(hint)
        else:
            inputs.append(_kind(hint))
            required += parameter.default is parameter.empty
    counts = attributes.pop("outputs", None) is not None
    return Rule(name, since, function, tuple(inputs), required, rest, attributes, counts)


def _kind(hint: Any) -> str:
    if hint in _KINDS:
        return _KINDS[hint]
    members = [m for m in typing.get_args(hint) if m is not type(None)]
    bare: Any = members[0]
    for member in members[1:]:
        bare = bare | member
    if bare not in _KINDS:
        raise TypeError(f"an input of an ONNX op cannot be annotated {hint}")
    return _KINDS[bare]


def refuse_attributes(rule: Rule, where: str, given: typing.Iterable[str]) -> None:
    """Raises SmeltError for an attribute that the function does not take."""
    if strange := sorted(set(given) - rule.attributes.keys()):
        hint = nearest(strange[0], rule.attributes)
        raise SmeltError(f"{where}: its attribute '{strange[0]}' cannot be imported yet{hint}")
