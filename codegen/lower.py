"""Lowering: chooses a kernel for every node of a Program, or says why there is none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx

from ..ir.cache import Site
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, EMBEDDING, HEAD, LINEAR, OPS, arguments
from ..ir.program import Program
from ..ir.weight import Weight
from . import attention, gemv
from .kernels import AttentionKernel, CacheReference, LinearKernel, Reference, RowOp, out_variant
from .plan import Choice, Plan, Target
from .rows import row_kernel

_TAKES_ENCODED = {"linear": ("weight",), "head": ("weight",), "embedding": ("weight",), "experts": ("gate_up", "down")}


def lower(program: Program, target: Target = "cpp", fallback: bool = True) -> Plan:
    """The plan of `program` for a target: `cpp` (generated kernels, ATen for the rest) or `torch` (the reference).

    `fallback=False` refuses a Program with an encoded weight or a cache site that the target has no kernel for.
    """
    choices: dict[str, Choice] = {}
    encoded: dict[str, tuple[str, ...]] = {}
    for node in program.graph.nodes:
        choice = _choose(program, node, target)
        if choice is not None:
            choices[node.name] = choice
            if node.target in OPS:
                encoded[node.name] = _TAKES_ENCODED.get(OPS[node.target].name, ())
    refused = [f"{name}: {c.why}" for name, c in choices.items() if c.fallback]
    if refused and not fallback and target != "torch":
        raise SmeltError(
            f"target {target} has no fast kernel for {len(refused)} nodes, first {refused[0]}; "
            "choose another encoding, or allow fallback=True to run them as torch ops"
        )
    return Plan(program, target, choices, encoded)


def _choose(program: Program, node: fx.Node, target: Target) -> Choice | None:
    if node.op != "call_function":
        return None
    if node.target is CACHED_ATTENTION.target:
        return _attention(program, node, target)
    if node.target in OPS:
        return _dialect(program, node, target)
    if not isinstance(node.target, torch._ops.OpOverload) or is_view(node.target):
        return None
    if node.target._schema.name == "aten::sym_size":
        return None
    variant = out_variant(node.target)
    if variant is not None:
        return Choice(variant, "library op with a planned output")
    return Choice(Reference(node.target, str(node.target)), "the library op has no out-variant")


def _dialect(program: Program, node: fx.Node, target: Target) -> Choice:
    op = OPS[node.target]
    reference = Reference(op.reference, op.name)
    if target == "torch":
        return Choice(reference, "target torch runs the reference")
    args = arguments(node)
    weight = _weight(program, args.get("weight"))
    if op in (LINEAR, HEAD):
        if weight is None:
            return Choice(reference, "the matrix is computed, not stored")
        reason = gemv.covers(weight.encoding, weight.shape)
        if reason is None:
            return Choice(LinearKernel(weight), f"{weight.encoding} of {list(weight.shape)}")
        return Choice(reference, f"gemv: {reason}", fallback=True)
    kernel = row_kernel(op, weight if op is EMBEDDING else None)
    if isinstance(kernel, str):
        return Choice(reference, kernel, fallback=_is_encoded(program, args))
    return Choice(RowOp(op, kernel), "row-wise template")


def _attention(program: Program, node: fx.Node, target: Target) -> Choice:
    if target == "torch":
        return Choice(CacheReference(), "target torch runs the reference")
    if program.cache is None:
        raise SmeltError(f"{node.name} reads a cache, but {program.name} has no cache plan")
    layer = int(arguments(node)["layer"])
    site = replace(program.cache[layer], layer=0)
    reason = attention.covers(site)
    if reason is not None:
        return Choice(CacheReference(), f"attention of layer {layer}: {reason}", fallback=True)
    return Choice(_shared(site), "attention over segments")


@cache
def _shared(site: Site) -> AttentionKernel:
    return AttentionKernel(site)


def _weight(program: Program, value: Any) -> Weight | None:
    return program.weights[str(value.target)] if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_encoded(program: Program, args: dict[str, Any]) -> bool:
    """Whether an argument is a weight in an encoding: then the reference decodes it on every call."""
    found = (_weight(program, a) for a in args.values())
    return any(w is not None and w.encoding.name != "dense" for w in found)


def is_view(overload: Any) -> bool:
    """Whether the result may share storage with an argument."""
    return any(r.alias_info is not None for r in overload._schema.returns)


