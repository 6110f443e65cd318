"""Lowering: chooses a kernel for every node of a Program, or says why there is none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import fx

from ..ir.blocks import stages
from ..ir.cache import Site
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, EMBEDDING, EXPERTS, HEAD, LINEAR, OPS, arguments
from ..ir.program import Program
from ..ir.weight import Weight
from . import attention, experts, gemv
from .arena import Arena
from .choices import is_encoded, refuse_fallbacks, strange, takes_encoded, weight_of
from .fuse import Region, fuse
from .fused import PointwiseKernel, ProductKernel, QuantizeKernel
from .gather import gather_kernel
from .kernels import AttentionKernel, CacheReference, Reference, RowOp, out_variant
from .plan import Choice, Plan, Target
from .roles import capacity
from .rows import row_kernel


def lower(program: Program, target: Target = "cpp", fallback: bool = True) -> Plan:
    """The plan of `program` for a target: `cpp` (generated kernels, ATen for the rest), `torch` (the reference), or
    `triton` (the kernels for GPUs).

    `fallback=False` refuses a Program with an encoded weight or a cache site that the target has no kernel for, or with
    a weight that saves memory but no time (see `roles`).
    """
    if target not in get_args(Target):
        raise SmeltError(f"unknown target '{target}'; known: {', '.join(get_args(Target))}")
    if target == "triton":
        from .lower_triton import lower_triton  # a CPU need not import what is for GPUs

        return lower_triton(program, fallback)
    return _lower(program, target, fallback, Arena())


def _lower(program: Program, target: Target, fallback: bool, arena: Arena) -> Plan:
    """The plan of a program whose weights, once they are packed, lie in `arena`."""
    choices: dict[str, Choice] = {}
    encoded: dict[str, tuple[str, ...]] = {}
    regions = fuse(program.graph, program.weights, partial(_refused, program)) if target == "cpp" else []
    fused = {node for region in regions for node in region.nodes}
    for node in program.graph.nodes:
        choice = _choose(program, node, target) if node not in fused else None
        if choice is not None:
            choices[node.name] = choice
            if node.target in OPS:
                encoded[node.name] = takes_encoded(node)
    memory = capacity(program) if target == "cpp" else {}
    if not fallback:
        refuse_fallbacks(program, target, choices, memory)
    draft = None if program.draft is None else _lower(program.draft, target, fallback, arena)
    shallow = tuple(_lower(stage, target, fallback, arena) for stage in stages(program))
    kernels = tuple((region, _fused(region, program, arena)) for region in regions)
    return Plan(program, target, choices, encoded, kernels, draft=draft, stages=shallow, capacity=memory)


def _refused(program: Program, node: fx.Node, width: int | None) -> str | None:
    """Why a product has no generated kernel, or None; `width` as in `Region`."""
    weight = weight_of(program, arguments(node)["weight"])
    if weight is None:
        return "the matrix is computed, not stored"
    reason = gemv.covers(weight.encoding, weight.shape, width) or strange(node)
    return f"gemv of {weight.encoding}: {reason}" if reason else None


def _fused(region: Region, program: Program, arena: Arena) -> ProductKernel | PointwiseKernel | QuantizeKernel:
    if region.kind == "product":
        return ProductKernel(region, program.weights, arena)
    return PointwiseKernel(region) if region.kind == "pointwise" else QuantizeKernel(region)


def is_view(overload: Any) -> bool:
    """Whether the result may share storage with an argument."""
    return any(r.alias_info is not None for r in overload._schema.returns)


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
    return _library(node, target)


def _library(node: fx.Node, target: Target) -> Choice:
    """The choice of an ATen op."""
    overload: Any = node.target
    kernel = row_kernel(overload)
    if target == "cpp" and not isinstance(kernel, str) and strange(node) is None:
        return Choice(RowOp(kernel), "row-wise template: the same bits in every row")
    variant = out_variant(overload)
    if variant is not None:
        return Choice(variant, "library op with a planned output")
    return Choice(Reference(overload, str(overload)), "the library op has no out-variant")


def _dialect(program: Program, node: fx.Node, target: Target) -> Choice:
    op = OPS[node.target]
    reference = Reference(op.reference, op.name)
    if target == "torch":
        return Choice(reference, "target torch runs the reference")
    args = arguments(node)
    weight = weight_of(program, args.get("weight"))
    if op in (LINEAR, HEAD):
        return Choice(reference, str(_refused(program, node, None)), fallback=weight is not None)
    if op is EXPERTS:
        return _experts(node, weight_of(program, args["gate_up"]), weight_of(program, args["down"]), reference)
    if op is EMBEDDING:
        kernel = gather_kernel(weight) if weight is not None else "the table is computed, not stored"
    else:
        kernel = row_kernel(op.target)
    reason = kernel if isinstance(kernel, str) else strange(node)
    if isinstance(kernel, str) or reason is not None:
        return Choice(reference, f"{op.name}: {reason}", fallback=is_encoded(program, args))
    return Choice(RowOp(kernel), "row-wise template")


def _experts(node: fx.Node, gate_up: Weight | None, down: Weight | None, reference: Reference) -> Choice:
    if gate_up is None or down is None:
        return Choice(reference, "the experts are computed, not stored")
    reason = experts.covers(gate_up, down) or strange(node)
    if reason is not None:
        return Choice(reference, f"experts: {reason}", fallback=True)
    return Choice(experts.ExpertsKernel(gate_up, down), f"{gate_up.encoding} of {list(gate_up.shape)}")


def _attention(program: Program, node: fx.Node, target: Target) -> Choice:
    if program.cache is None:
        raise SmeltError(f"{node.name} reads a cache, but {program.name} has no cache plan")
    if target == "torch":
        return Choice(CacheReference(), "target torch runs the reference")
    layer = int(arguments(node)["layer"])
    site = replace(program.cache[layer], layer=0)
    reason = attention.covers(site) or strange(node)
    if reason is not None:
        return Choice(CacheReference(), f"attention of layer {layer}: {reason}", fallback=True)
    return Choice(_shared(site), "attention over segments")


@cache
def _shared(site: Site) -> AttentionKernel:
    return AttentionKernel(site)
