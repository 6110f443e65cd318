"""The text form: what is printed parses back equal, and every change shows."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from smelt.ir.interpret import interpret
from smelt.ir.ops import LINEAR, RMS_NORM
from smelt.ir.program import Program
from smelt.ir.shapes import derive, symbol
from smelt.ir.text import parse_program, print_program, same_program
from smelt.ir.text.lexer import Reader
from smelt.ir.text.types import read_type, show_type
from smelt.ir.text.values import read_value, show_value
from smelt.ir.weight import Weight

from .programs import FAMILIES, affine_layer, captured, one_call, rich

aten = torch.ops.aten

LAYER = """\
smelt 1
program "layer"
facts {
  "inputs": {"x": {"shape": ["B", 4], "dtype": "float32"}},
}
weights {
  @layer.weight: [3, 4] dense(dtype=float32)
  @layer.bias: [3] dense(dtype=float32)
}
graph {
  %x: f32[B, 4] = input("x")
  %linear_default: f32[B, 3] = smelt.linear(%x, @layer.weight, @layer.bias)
  return {"y": %linear_default}
}
"""


def reparsed(program: Program) -> Program:
    return parse_program(print_program(program), program.weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_programs_parse_back_equal(family: str) -> None:
    program = captured(family)
    text = print_program(program)
    again = parse_program(text, program.weights)
    assert same_program(program, again) is None
    assert print_program(again) == text
    again.graph.lint()
    inputs = dict.fromkeys(program.inputs, torch.arange(6).reshape(2, 3))
    with torch.no_grad():
        assert torch.equal(interpret(program, inputs)["logits"], interpret(again, inputs)["logits"])


def test_plans_history_and_origins_parse_back_equal() -> None:
    program = rich()
    again = reparsed(program)
    assert same_program(program, again) is None
    assert (again.cache, again.decode, again.history) == (program.cache, program.decode, program.history)
    assert again.origin == program.origin
    assert again.changed_by("cache") == " since step 2, cache.insert"


def test_reads_like_this() -> None:
    program = affine_layer()
    derive(program)
    assert print_program(program, hashes=False) == LAYER
    assert same_program(parse_program(LAYER, program.weights), program) is None


def test_one_text_for_one_program() -> None:
    program = rich()
    assert print_program(program) == print_program(program.fork()) == print_program(program)


def test_names_that_need_care() -> None:
    weights = {"/mm/Mul_1": Weight.of(torch.ones(2)), "sum": Weight.of(torch.ones(2)), "x": Weight.of(torch.zeros(2))}
    graph = fx.Graph()
    x = graph.placeholder("a b")
    total = x
    for name in weights:
        total = graph.call_function(aten.add.Tensor, (total, graph.create_node("get_attr", name)))
    total = graph.create_node("call_function", aten.mul.Tensor, (total, total), {}, "sum_1")
    last = graph.create_node("call_function", aten.div.Tensor, (total, x), {"rounding_mode": "floor"}, "x")
    graph.output({'say "y"': last})
    program = Program('a "name"', graph, weights, {"inputs": {"a b": {"shape": ["B", 2], "dtype": "float32"}}})
    assert same_program(program, reparsed(program)) is None


def test_python_operators_and_dtypes_parse_back() -> None:
    program = one_call(aten.to.dtype, {"x": ("B", 4)}, "$x", torch.float16)
    with program.graph.inserting_before(program.graph.output_node()):
        size = program.graph.call_function(aten.sym_size.int, (next(iter(program.graph.nodes)), 0))
        half = program.graph.call_function(operator.floordiv, (size, 2))
        full = program.graph.call_function(aten.full.default, ([half, 3], -math.inf), {"dtype": torch.float32})
    program.set_output("full", full)
    derive(program)
    assert same_program(program, reparsed(program)) is None
    assert "%floordiv: int(floor(B/2)) = operator.floordiv(%sym_size_int, 2)" in print_program(program)


_CHANGES: dict[str, Any] = {
    "facts": lambda p: p.facts.update(context=129),
    "facts.eos": lambda p: p.facts.update(eos=[True]),
    "cache": lambda p: setattr(p, "cache", p.cache.with_site(replace(p.cache.sites[1], tail=96))),
    "decode": lambda p: setattr(p, "decode", replace(p.decode, limits=(1, 2))),
    "history": lambda p: setattr(p, "history", p.history[:1]),
    "history[0].changed": lambda p: p.origin.pop("model.layers.0.mlp.up_proj.weight"),
    "weights": lambda p: p.weights.pop("lm_head.weight"),
    "content": lambda p: p.weights.update({"lm_head.weight": Weight.of(p.weights["lm_head.weight"].dense() * 1.05)}),
    "node": lambda p: setattr(
        next(p.calls(aten.transpose.int)), "args", (*next(p.calls(aten.transpose.int)).args[:2], 3)
    ),
    "nodes": lambda p: p.graph.erase_node(
        p.set_output("logits", list(p.calls(RMS_NORM))[-1]) or list(p.graph.nodes)[-2]
    ),
    "node.%": lambda p: next(p.calls(LINEAR)).meta.update(shape=(1,)),
}


@pytest.mark.parametrize("place", list(_CHANGES))
def test_every_change_is_named(place: str) -> None:
    program, changed = rich(), rich()
    _CHANGES[place](changed)
    found = same_program(program, changed)
    assert found is not None and found.startswith(place.partition(".%")[0])


def test_a_string_is_not_the_node_of_that_name() -> None:
    one, other = (one_call(aten.add.Tensor, {"x": (2,)}, "$x", 1) for _ in range(2))
    next(other.calls(aten.add.Tensor)).args = (next(iter(other.graph.nodes)), "%x")
    next(one.calls(aten.add.Tensor)).args = (next(iter(one.graph.nodes)),) * 2
    assert same_program(one, other) is not None


_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(torch.float16))
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=12,
)


def read_all(text: str, read: Any) -> Any:
    reader = Reader(text)
    value = read(reader)
    assert reader.peek().kind == "end"
    return value


@given(_VALUES)
def test_values_parse_back_type_for_type(value: Any) -> None:
    assert repr(read_all(show_value(value), read_value)) == repr(value)


_ATOMS = st.one_of(st.integers(1, 99).map(sympy.Integer), st.sampled_from("BTS").map(symbol))
_DIMS = st.recursive(
    _ATOMS,
    lambda d: st.one_of(
        *(st.tuples(d, d).map(lambda p, f=f: f(*p)) for f in (operator.add, operator.sub, operator.mul, sympy.Max)),
        st.tuples(d, st.integers(2, 9)).map(lambda p: sympy.floor(p[0] / p[1])),
        st.tuples(d, st.integers(2, 9)).map(lambda p: sympy.Mod(*p)),
    ),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.lists(_DIMS, max_size=3))
def test_types_parse_back_equal(dims: list[Any]) -> None:
    meta = {"shape": tuple(int(d) if d.is_Integer else d for d in dims), "dtype": torch.float32}
    assert read_all(str(show_type(meta)), read_type) == meta
