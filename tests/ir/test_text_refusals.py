"""Texts that are refused: broken ones by line and column, unprintable programs by name, mutated ones always cleanly."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.ir.errors import SmeltError
from smelt.ir.ops import LINEAR
from smelt.ir.program import Program, Record
from smelt.ir.shapes import derive
from smelt.ir.text import parse_program, print_program, same_program
from smelt.ir.text.lexer import NESTING, Reader
from smelt.ir.weight import Weight

from .programs import affine_layer, rich


def layer_text() -> str:
    """The text that test_text.py shows in full."""
    program = affine_layer()
    derive(program)
    return print_program(program, hashes=False)


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
    text = layer_text()
    assert old in text
    with pytest.raises(SmeltError, match=message) as raised:
        parse_program(text.replace(old, new, 1), affine_layer().weights)
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


@cache
def printed(name: str) -> tuple[str, Program]:
    """A program and its text, made once."""
    program = rich() if name == "rich" else affine_layer()
    return print_program(program), program


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
    text, original = printed(name)
    try:
        program = parse_program(mutated(text, seed), original.weights)
    except SmeltError:
        return
    assert same_program(program, parse_program(print_program(program), program.weights)) is None
