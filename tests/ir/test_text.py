"""The text form: what is printed parses back equal, every change shows, and no text does more than raise SmeltError."""

from __future__ import annotations

import math
import operator
import random
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from smelt.ir.cache import Select
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import LINEAR, RMS_NORM
from smelt.ir.program import Program, Record
from smelt.ir.shapes import derive, symbol
from smelt.ir.text import parse_program, print_program, same_program
from smelt.ir.text.lexer import NESTING, Reader
from smelt.ir.text.types import read_type, show_type
from smelt.ir.text.values import read_value, show_value
from smelt.ir.weight import Weight

from .programs import FAMILIES, affine_layer, cached, captured, one_call, quantized

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


def rich() -> Program:
    """A program with everything that a program may carry."""
    program = cached(
        quantized(captured("llama"), Affine(4, 32)),
        sink=4,
        tail=64,
        keys=Affine(8, 32, "channel", True, "float32"),
        values=Affine(8, 16),
        select=Select("key_norm", 0.5, 256),
    )
    record = Record(1, "weights.quantize", {"bits": 4, "only": ("mlp",)}, {"kl": 1.5e-3, "worst": math.inf, "left": []})
    other = Record(2, "cache.insert", {}, {"done": True, "why": None})
    program.history = (record, other)
    program.origin = {"model.layers.0.mlp.up_proj.weight": record, "cache": other, "lm_head.weight": other}
    program.decode = DecodePlan("recycle", Tree.from_paths([(0,), (1,), (0, 0)]), 4)
    derive(program)
    return program


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
    "decode": lambda p: setattr(p, "decode", replace(p.decode, width=5)),
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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("smelt 1", "smelt 2", "line 1, column 1: text form 2"),
        ("smelt.linear(", "smelt.liner(", r"line 12, column 32: the dialect has no op 'smelt.liner' \(did you mean"),
        ("smelt.linear(", "aten.add_.Tensor(", "line 12.*writes in place"),
        ("smelt.linear(", "aten.add.out(", "line 12.*writes in place"),
        ("smelt.linear(", "aten.from_file.default(", "line 12.*reads or writes a file"),
        ("smelt.linear(", "aten.nothing.default(", "has no ATen op"),
        ("smelt.linear(", "aten.__class__.__init__(", "has no ATen op"),
        ("smelt.linear(", "os.system(", "unknown op 'os.system'"),
        ("smelt.linear(", "builtins.eval(", "unknown op 'builtins.eval'"),
        ("smelt.linear(%x", "smelt.linear(%z", "line 12, column 45: %z is not defined above"),
        ("@layer.weight, ", "@layer.wight, ", r"no weight 'layer.wight' in the table above \(did you mean"),
        ("@layer.bias: [3]", "@layer.bias: [4]", r"weight 'layer.bias' is dense.* \[4\] in the text, but its value"),
        ("@layer.bias:", "@layer.bais:", r"weight 'layer.bais' has no value \(did you mean"),
        ("@layer.bias: [3] dense(dtype=float32)", "@layer.bias: [3] dense(dtype=floot32)", "did you mean 'float32'"),
        ("[3] dense(dtype=float32)", "[3] dense(dtype=float32) #0123456789ab", "its hash differs"),
        ("%x:", "%linear_default:", "%linear_default is defined twice"),
        ('return {"y": %linear_default}', 'return {"y": 3}', "returns its outputs by name"),
        ('return {"y": %linear_default}', "return [%linear_default]", "returns its outputs by name"),
        ("f32[B, 3]", "f32[B, T/0]", "not a size"),
        ("f32[B, 3]", "f32[B, Mod(T, 0)]", "not a size"),
        ("f32[B, 3]", "f32[B, (9**8)**8]", "power"),
        ("f32[B, 3]", "f33[B, 3]", "unknown type 'f33'"),
        ('"dtype": "float32"', '"shape": 1', "stands here twice"),
        ("facts {", "facts {" + '"a": ' + "[" * 5000 + "]" * 5000, f"nested more than {NESTING} deep"),
        ("f32[B, 3]", f"f32[{'-' * 5000}3]", f"nested more than {NESTING} deep"),
        ("facts {", 'facts { "a": ' + "9" * 5000 + ",", "an integer of 5000 digits"),
        ("facts {", 'facts { "a": "\\q",', "broken string"),
        ("weights {", 'cache [{"layer": 0}] weights {', "not a plan"),
        ("weights {", 'decode {"drafter": "heads"} weights {', "not a plan"),
        ("graph {", "graph ?", "cannot read"),
    ],
)
def test_a_broken_text_is_refused_by_line_and_column(old: str, new: str, message: str) -> None:
    assert old in LAYER
    with pytest.raises(SmeltError, match=message) as raised:
        parse_program(LAYER.replace(old, new, 1), affine_layer().weights)
    assert str(raised.value).startswith("program text, line ")


def test_a_changed_weight_is_refused() -> None:
    program = affine_layer()
    text = print_program(program)
    weights = {**program.weights, "layer.bias": Weight.of(torch.full((3,), 1.05))}
    with pytest.raises(SmeltError, match=r"the value of weight 'layer\.bias' is not the one that was printed"):
        parse_program(text, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.facts.update(x=object()), "facts: has no text form: <object"),
        (lambda p: p.facts.update(x={1: 2}), "facts: has no text form: the key 1 is not a string"),
        (lambda p: setattr(next(p.calls(LINEAR)), "target", print), "%linear_default: .*neither an ATen overload"),
        (lambda p: setattr(p, "history", (Record(3, "x", {"f": torch.ones(1)}),)), "history, step 3, x: has no text"),
    ],
)
def test_what_cannot_be_printed_is_named(change: Any, message: str) -> None:
    program = affine_layer()
    change(program)
    with pytest.raises(SmeltError, match=message):
        print_program(program)


_TEXTS: dict[str, tuple[str, dict[str, Weight]]] = {}


def texts(name: str) -> tuple[str, dict[str, Weight]]:
    """A printed program and its weights, made once."""
    if name not in _TEXTS:
        program = rich() if name == "rich" else affine_layer()
        _TEXTS[name] = print_program(program), program.weights
    return _TEXTS[name]


def mutated(text: str, seed: int) -> str:
    """The text after one to three edits of characters or tokens."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        tokens = Reader(text).tokens[:-1] if rng.random() < 0.6 and _reads(text) else None
        spans = [(t.at, t.at + len(t.text)) for t in tokens] if tokens else [(i, i + 1) for i in range(len(text))]
        (start, end), (other, until) = rng.choice(spans), rng.choice(spans)
        new = rng.choice(["", text[other:until], text[start:end] * 2, rng.choice('[](){}%@#:,=-"\\0 9e.nil∞\n')])
        text = text[:start] + new + text[end:]
    return text


def _reads(text: str) -> bool:
    try:
        return bool(Reader(text).tokens)
    except SmeltError:
        return False


@settings(max_examples=150)
@given(st.sampled_from(["layer", "rich"]), st.integers(0, 2**32))
def test_a_mutated_text_parses_or_is_refused(name: str, seed: int) -> None:
    text, weights = texts(name)
    try:
        program = parse_program(mutated(text, seed), weights)
    except SmeltError:
        return
    assert same_program(program, reparsed(program)) is None
