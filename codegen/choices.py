"""What lowering asks of a node whichever target it is for: its weights, the types of its tensors, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.errors import SmeltError
from ..ir.ops import OPS, arguments
from ..ir.program import Program
from ..ir.weight import Weight
from .plan import Choice

_TAKES_ENCODED = {"linear": ("weight",), "head": ("weight",), "embedding": ("weight",), "experts": ("gate_up", "down")}
_INTEGERS = ("ids", "positions", "chosen")  # arguments of kernels that are int64; all others are float32


def takes_encoded(node: fx.Node) -> tuple[str, ...]:
    """The arguments that a kernel of this op of the dialect takes as stored weights."""
    return _TAKES_ENCODED.get(OPS[node.target].name, ())


def weight_of(program: Program, value: Any) -> Weight | None:
    """The weight that an argument reads, or None for what is computed."""
    return program.weights[str(value.target)] if isinstance(value, fx.Node) and value.op == "get_attr" else None


def is_encoded(program: Program, args: Mapping[str, Any]) -> bool:
    """Whether an argument is a weight in an encoding: then the reference decodes it on every call."""
    found = (weight_of(program, a) for a in args.values())
    return any(w is not None and w.encoding.name != "dense" for w in found)


def strange(node: fx.Node) -> str | None:
    """Why the tensors of a node do not fit a kernel of ours, or None; types that were not derived are taken to fit."""
    for name, value in arguments(node).items():
        dtype = value.meta.get("dtype") if isinstance(value, fx.Node) else None
        wanted = torch.int64 if name in _INTEGERS else torch.float32
        if isinstance(dtype, torch.dtype) and dtype is not wanted:
            return f"'{name}' is {str(dtype).removeprefix('torch.')}, kernels take {str(wanted).removeprefix('torch.')}"
    return None


def refuse_fallbacks(
    program: Program, target: str, choices: Mapping[str, Choice], capacity: Mapping[str, str] | None = None
) -> None:
    """Raises SmeltError where the target has no fast kernel for what a node stores; `capacity` as in `Plan`."""
    why = {name: choice.why for name, choice in choices.items() if choice.fallback} | dict(capacity or {})
    if why:
        first, reason = next(iter(why.items()))
        raise SmeltError(
            f"target {target} has no fast kernel for {len(why)} nodes of {program.name}, first {first}: {reason}; "
            "choose another encoding, or allow fallback=True to run them slowly"
        )
