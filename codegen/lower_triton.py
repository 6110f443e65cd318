"""Lowering for GPUs: the Triton kernel of every region and node of a Program, or why torch computes it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import fx

from ..ir.blocks import stages
from ..ir.cache import Site
from ..ir.errors import SmeltError
from ..ir.ops import CACHED_ATTENTION, EMBEDDING, EXPERTS, HADAMARD, HEAD, LINEAR, OPS, QUANTIZED, RMS_NORM, arguments
from ..ir.program import Program
from ..ir.weight import Weight
from . import attention_triton
from .attention_triton import TritonAttention
from .chains_triton import ProductsKernel, covers
from .choices import is_encoded, refuse_fallbacks, strange, takes_encoded, weight_of
from .device_triton import likely, placed
from .fuse import Region, fuse
from .gemm_triton import TritonProduct
from .hadamard_triton import LARGEST, HadamardKernel
from .kernels import CacheReference, Reference, out_variant
from .nodes_triton import AttentionKernel, GatherKernel, NormKernel, RoundKernel, gather_refuses
from .plan import Choice, Kernel, Plan
from .pointwise_triton import PointwiseKernel
from .product_triton import Product
from .regions_triton import Fused, RegionKernel, attention, with_norm

_ROUNDED = 16  # bits of activations up to which codes are exact in float32


def lower_triton(program: Program, fallback: bool = True) -> Plan:
    """The plan of `program` for target triton; its weights go to the device as they are stored, when first read."""
    to = likely()
    program = replace(program, weights={name: placed(weight, to) for name, weight in program.weights.items()})
    return _lower(program, fallback, to, {}, {})


def _lower(
    program: Program,
    fallback: bool,
    to: torch.device,
    products: dict[Product, TritonProduct],
    stacked: dict[tuple[str, ...], Weight],
) -> Plan:
    """The plan of a program on the device; the stages of its depth plan share compiled products and weights with it."""
    regions = [
        with_norm(r) if r.kind == "product" else r
        for r in fuse(program.graph, program.weights, partial(_refused, program))
    ]
    kernels: list[tuple[Region, RegionKernel]] = [
        (r, ProductsKernel(r, program.weights, products, stacked) if isinstance(r, Fused) else PointwiseKernel(r))
        for r in regions
    ]
    sites: dict[Site, TritonAttention] = {}
    for node in program.graph.nodes:
        if node.target is CACHED_ATTENTION.target and _unread(program, node) is None:
            region = attention(node)
            kernels.append((region, AttentionKernel(region, _site(program, node), sites)))
    fused = {node for region, _ in kernels for node in region.nodes}
    choices = {
        node.name: choice
        for node in program.graph.nodes
        if node not in fused and (choice := _choose(program, node)) is not None
    }
    encoded = {node.name: takes_encoded(node) for node in program.graph.nodes if node.target in OPS}
    if not fallback:
        refuse_fallbacks(program, "triton", choices)
    draft = None if program.draft is None else lower_triton(program.draft, fallback)
    shallow = tuple(_lower(stage, fallback, to, products, stacked) for stage in stages(program))
    return Plan(program, "triton", choices, encoded, tuple(kernels), to, draft, shallow)


def holds_up(plan: Plan) -> str | None:
    """Why a step of a plan cannot be captured in a graph, or None: a node that waits for what the device computed."""
    for name, choice in plan.choices.items():
        kernel = choice.kernel
        if isinstance(kernel, CacheReference):
            return f"{name}: {choice.why}"
        if not isinstance(kernel, Reference):
            continue
        tags = getattr(kernel.function, "tags", ())
        if kernel.label == EXPERTS.name or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*tags}:
            return f"{name}: what {kernel.name} reads or makes depends on values"
    return None


def _refused(program: Program, node: fx.Node, width: int | None) -> str | None:
    """Why a product has no kernel, or None; `width` as in `Region`."""
    weight = weight_of(program, arguments(node)["weight"])
    if weight is None:
        return "the matrix is computed, not stored"
    if width is not None:
        return "products read the values of rounded activations, not their codes"
    reason = covers(weight.encoding, weight.shape) or strange(node)
    return f"product with {weight.encoding}: {reason}" if reason else None


def _choose(program: Program, node: fx.Node) -> Choice | None:
    if node.op != "call_function":
        return None
    if node.target is CACHED_ATTENTION.target:
        return Choice(CacheReference(), f"attention of {node.name}: {_unread(program, node)}", fallback=True)
    if node.target in OPS:
        return _dialect(program, node)
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name == "aten::sym_size":
        return None
    if any(r.alias_info is not None for r in node.target._schema.returns):
        return None  # a view
    variant = out_variant(node.target)
    if variant is not None:
        return Choice(variant, "library op with a planned output")
    return Choice(Reference(node.target, str(node.target)), "the library op has no out-variant")


def _dialect(program: Program, node: fx.Node) -> Choice:
    op, args = OPS[node.target], arguments(node)
    reference = Reference(op.reference, op.name)
    if op in (LINEAR, HEAD):
        stored = weight_of(program, args["weight"]) is not None
        return Choice(reference, str(_refused(program, node, None)), fallback=stored)
    kernel: Kernel | str = "no Triton template"
    if op is EMBEDDING:
        table = weight_of(program, args["weight"])
        why = "the table is computed, not stored" if table is None else gather_refuses(table)
        kernel = why if why is not None or table is None else GatherKernel(table)  # type: ignore[assignment]
    elif op is RMS_NORM:
        kernel = NormKernel()
    elif op is HADAMARD and int(args["size"]) <= LARGEST:
        kernel = HadamardKernel()
    elif op is QUANTIZED and int(args["bits"]) <= _ROUNDED:
        kernel = RoundKernel()
    reason = kernel if isinstance(kernel, str) else strange(node)
    if isinstance(kernel, str) or reason is not None:
        return Choice(reference, f"{op.name}: {reason}", fallback=is_encoded(program, args))
    return Choice(kernel, "a launch of its own")


def _unread(program: Program, node: fx.Node) -> str | None:
    """Why a cached attention has no kernel, or None."""
    return _covered(_site(program, node)) or strange(node)


@cache
def _covered(site: Site) -> str | None:
    return attention_triton.covers(site)


def _site(program: Program, node: fx.Node) -> Site:
    if program.cache is None:
        raise SmeltError(f"{node.name} reads a cache, but {program.name} has no cache plan")
    return replace(program.cache[int(arguments(node)["layer"])], layer=0)
