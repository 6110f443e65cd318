"""The verifier: what capture makes passes, and each kind of broken Program is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from smelt.ir import decode as drafts
from smelt.ir.cache import CachePlan
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine, Dense
from smelt.ir.errors import SmeltError
from smelt.ir.ops import ATTENTION, CACHED_ATTENTION, EMBEDDING, EXPERTS, GATED, HEAD, LINEAR, RMS_NORM, ROTARY
from smelt.ir.program import Program, Record
from smelt.ir.verify import verify
from smelt.ir.weight import Weight

from .programs import FAMILIES, affine_layer, cached, captured, quantized

aten = torch.ops.aten
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_programs_verify(family: str) -> None:
    program = captured(family)
    verify(program)
    verify(cached(program, sink=4, tail=64, values=Affine(8, 16)))
    verify(quantized(program, Affine(4, 32)))


def test_a_plain_module_verifies() -> None:
    verify(affine_layer())


def first(program: Program, op: Any) -> fx.Node:
    return next(program.calls(op))


def swap(program: Program, op: Any, index: int, value: Any) -> None:
    """Replace one argument of the first call of an op."""
    node = first(program, op)
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def reading(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)


def store(program: Program, name: str, **changes: Any) -> None:
    program.weights[name] = replace(program.weights[name], **changes)


def shrink(program: Program, name: str, rows: int) -> None:
    program.weights[name] = Weight.of(program.weights[name].dense()[:rows].clone())


def heads(program: Program, count: int, depth: int) -> None:
    """Add an output `heads` of `count` heads and a plan that drafts `depth` tokens ahead."""
    with program.graph.inserting_before(program.graph.output_node()):
        stacked = program.graph.call_function(aten.stack.default, ([program.outputs["logits"]] * count, -2))
    program.set_output("heads", stacked)
    program.decode = DecodePlan(drafts.Heads(Tree.from_paths([(0,) * depth]), 2))


def forget_output(program: Program) -> None:
    program.graph.erase_node(program.graph.output_node())


def in_place(program: Program) -> None:
    node = first(program, aten.add.Tensor)
    node.target = aten.add_.Tensor


def float_ids(program: Program) -> None:
    node = first(program, EMBEDDING)
    with program.graph.inserting_before(node):
        swap(program, EMBEDDING, 0, program.graph.call_function(aten.to.dtype, (node.args[0], torch.float32)))


def use_before_definition(program: Program) -> None:
    late = list(program.calls(LINEAR))[-1]
    first(program, RMS_NORM).args = (late, *first(program, RMS_NORM).args[1:])


_BROKEN: dict[str, tuple[Callable[[Program], Any], str]] = {
    "no output": (forget_output, "must end in one output node"),
    "unnamed output": (
        lambda p: setattr(p.graph.output_node(), "args", ((p.outputs["logits"],),)),
        "names its results",
    ),
    "output of an int": (lambda p: setattr(p.graph.output_node(), "args", ({"logits": 3},)), "output 'logits' is 3"),
    "output of several": (
        lambda p: p.set_output("size", first(p, aten.sym_size.int)),
        "'size' is %sym_.* not one tensor",
    ),
    "use before definition": (use_before_definition, "the graph is malformed"),
    "unknown op": (lambda p: setattr(first(p, aten.add.Tensor), "target", torch.add), "neither an ATen overload"),
    "in place": (in_place, "'aten.add_.Tensor' writes in place"),
    "missing weight": (lambda p: p.weights.pop(UP), f"%model.* reads the weight '{UP}', which is missing"),
    "unread weight": (lambda p: p.weights.update(extra=Weight.of(torch.ones(1))), "nothing reads the weight 'extra'"),
    "shape of a part": (lambda p: store(p, UP, shape=(64, 128)), f"weight '{UP}' .*its part is torch.float32"),
    "type of a part": (lambda p: store(p, UP, encoding=Dense("float16")), f"weight '{UP}' .*its part is torch.float32"),
    "K of a linear": (lambda p: p.weights.update({UP: Weight.of(torch.ones(128, 63))}), r"fit weight \[128, 63\]"),
    "rank of a linear": (lambda p: p.weights.update({UP: Weight.of(torch.ones(64))}), r"fit weight \[64\]"),
    "bias of a linear": (lambda p: swap(p, HEAD, 2, reading(p, "model.norm.weight")), r"bias \[64\] does not fit"),
    "K of a norm": (lambda p: shrink(p, "model.norm.weight", 63), r"weight \[63\] does not fit the last dim of x"),
    "gated halves": (lambda p: swap(p, GATED, 0, first(p, RMS_NORM)), "gate .* and up .* differ|does not fit"),
    "activation": (lambda p: swap(p, GATED, 2, "silo"), "unknown activation 'silo'"),
    "ids of a float": (float_ids, "ids must be integers"),
    "pairs of rotary": (
        lambda p: p.weights.update({"model.rotary_emb.inv_freq": Weight.of(torch.ones(9))}),
        "turns pairs",
    ),
    "positions of rotary": (lambda p: swap(p, ROTARY, 1, first(p, aten.view.default)), r"needs positions \[B, T\]"),
    "attention heads": (lambda p: swap(p, ATTENTION, 2, first(p, ATTENTION).args[0]), "key and value differ"),
    "mask of other tokens": (lambda p: swap(p, ATTENTION, 3, first(p, EMBEDDING)), r"mask \[B, T, 64\] does not fit"),
    "padding mask": (lambda p: swap(p, ATTENTION, 3, first(p, EMBEDDING).args[1]), r"mask \[97, 64\] does not fit"),
    "attention of nothing": (lambda p: swap(p, ATTENTION, 7, 0), "a window of 0 tokens"),
    "logits of another name": (
        lambda p: setattr(p.graph.output_node(), "args", ({"x": p.outputs["logits"]},)),
        "output logits",
    ),
    "vocabulary": (lambda p: p.facts.update(vocabulary=98), r"logits are \[B, T, 97\], a decoder of 98 tokens"),
    "two readers": (lambda p: setattr(p, "cache", None) or insert(p, 0), "has no cache plan"),
}


def insert(program: Program, layer: int) -> None:
    """Make the first attention a cached one."""
    node = first(program, ATTENTION)
    node.args = (*node.args[:3], None, layer, 0.25)
    node.target = CACHED_ATTENTION.target


@pytest.mark.parametrize("what", list(_BROKEN))
def test_a_broken_program_is_refused(what: str) -> None:
    program = captured("llama")
    change, message = _BROKEN[what]
    change(program)
    with pytest.raises(SmeltError, match=message) as raised:
        verify(program)
    assert str(raised.value).startswith("llama: ")


def resite(program: Program, **changes: Any) -> None:
    assert program.cache is not None
    program.cache = program.cache.with_site(replace(program.cache.sites[1], **changes))


_BROKEN_CACHE: dict[str, tuple[Callable[[Program], Any], str]] = {
    "no plan": (lambda p: setattr(p, "cache", None), "smelt.cached_attention has no cache plan"),
    "no site": (
        lambda p: setattr(p, "cache", CachePlan(p.cache.sites[:1])),
        "layer 1, for which the cache plan has no site",
    ),
    "no reader": (
        lambda p: setattr(p, "cache", CachePlan((*p.cache.sites, replace(p.cache.sites[0], layer=2)))),
        "no cached_attention reads the cache site of layer 2",
    ),
    "two readers": (lambda p: swap(p, CACHED_ATTENTION, 4, 1), "and %.* both write the cache site of layer 1"),
    "heads": (lambda p: resite(p, heads=8), "layer 1 has heads 8, the node 4"),
    "kv heads": (lambda p: resite(p, kv_heads=4), "layer 1 has kv_heads 4, the node 2"),
    "key dim": (lambda p: resite(p, key_dim=32), "layer 1 has key_dim 32, the node 16"),
    "value dim": (lambda p: resite(p, value_dim=32), "layer 1 has value_dim 32, the node 16"),
    "window": (lambda p: resite(p, window=8), "layer 1 has window 8, the node None"),
    "head count": (lambda p: heads(p, 2, 3), "the tree is 3 deep, but there are 2 heads"),
    "head output": (
        lambda p: heads(p, 2, 2) or p.set_output("heads", p.outputs["logits"]),
        r"must be \[B, T, heads, 97\]",
    ),
    "head vocabulary": (
        lambda p: setattr(p, "decode", DecodePlan(drafts.Recycle(Tree.from_paths([(0,)]), 98))),
        "drafts 98 candidates out of 97 tokens",
    ),
    "no heads": (
        lambda p: setattr(p, "decode", DecodePlan(drafts.Heads(Tree.from_paths([(0,)]), 2))),
        "reads the output 'heads', which the program does not have",
    ),
}


@pytest.mark.parametrize("what", list(_BROKEN_CACHE))
def test_a_broken_plan_is_refused(what: str) -> None:
    program = cached(captured("llama"))
    change, message = _BROKEN_CACHE[what]
    change(program)
    with pytest.raises(SmeltError, match=message):
        verify(program)


def test_plans_that_fit_verify() -> None:
    program = cached(captured("llama"))
    heads(program, 3, 3)
    verify(program)
    windowed = cached(captured("gemma2"))
    assert windowed.cache is not None and {site.window for site in windowed.cache.sites} == {8, None}
    verify(windowed)


def test_a_fault_names_the_step_that_made_it() -> None:
    program = quantized(captured("llama"), Affine(4, 32))
    parts = dict(program.weights[UP].parts)
    program.weights[UP] = replace(program.weights[UP], parts={**parts, "scale": parts["scale"][:, :1]})
    program.origin[UP] = Record(2, "weights.quantize", {})
    with pytest.raises(
        SmeltError, match=r"parts hold \d+ bits, the encoding asks for \d+ since step 2, weights.quantize"
    ):
        verify(program)


def test_experts_must_fit() -> None:
    program = captured("mixtral")
    node = first(program, EXPERTS)
    node.args = (*node.args[:3], node.args[4], node.args[4], node.args[5])
    with pytest.raises(SmeltError, match=r"gate_up .* do not fit"):
        program.prune()
        verify(program)
