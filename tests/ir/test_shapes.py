"""Derived shapes: symbols for sizes, agreement with real runs at several sizes, and errors that name the node."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import derive, symbol

from .programs import FAMILIES, affine_layer, captured, one_call, quantized

aten = torch.ops.aten
B, T = symbol("B"), symbol("T")


def mismatch(program: Program, batch: int, length: int) -> str | None:
    """The first node whose derived shape or type is not that of a real run."""
    found: list[str] = []

    def watch(node: fx.Node, args: Any, value: Any) -> None:
        meta, sizes = node.meta, {B: batch, T: length}
        shapes = meta["shape"] if isinstance(meta["dtype"], tuple) else (meta["shape"],)
        dtypes = meta["dtype"] if isinstance(meta["dtype"], tuple) else (meta["dtype"],)
        values = value if isinstance(value, list | tuple) else (value,)
        for shape, dtype, one in zip(shapes, dtypes, values, strict=True):
            expected = tuple(int(sympy.sympify(d).subs(sizes)) for d in shape)
            if isinstance(one, torch.Tensor) and (expected, dtype) != (tuple(one.shape), one.dtype):
                found.append(f"{node.name}: {expected} {dtype}, ran {tuple(one.shape)} {one.dtype}")
            if isinstance(one, int) and int(sympy.sympify(meta["value"]).subs(sizes)) != one:
                found.append(f"{node.name}: {meta['value']}, ran {one}")

    tokens = torch.zeros(batch, length, dtype=torch.int64)
    with torch.no_grad():
        interpret(program, dict.fromkeys(program.inputs, tokens), watch=watch)
    return found[0] if found else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 5), (3, 24)])
def test_derived_shapes_are_those_of_a_run(family: str, batch: int, length: int) -> None:
    program = captured(family)
    derive(program)
    assert mismatch(program, batch, length) is None


def test_a_wrong_shape_is_noticed() -> None:
    program = captured("llama")
    derive(program)
    node = next(program.calls(aten.transpose.int))
    node.meta["shape"] = (*node.meta["shape"][:-1], T)
    assert "transpose" in str(mismatch(program, 2, 5))


def test_logits_are_symbolic() -> None:
    program = captured("llama")
    derive(program)
    assert program.outputs["logits"].meta["shape"] == (B, T, 97)
    assert program.outputs["logits"].meta["dtype"] == torch.float32


def test_nodes_of_a_rewrite_get_their_shape() -> None:
    program = captured("llama")
    with program.graph.inserting_before(program.graph.output_node()):
        flat = program.graph.call_function(aten.flatten.using_ints, (program.outputs["logits"], 0, 1))
    program.set_output("flat", flat)
    derive(program)
    assert flat.meta["shape"] == (B * T, 97)


def test_encoded_weights_count_as_decoded() -> None:
    plain, small = captured("llama"), quantized(captured("llama"), Affine(4, 32))
    derive(plain)
    derive(small)
    assert [n.meta.get("shape") for n in plain.graph.nodes] == [n.meta.get("shape") for n in small.graph.nodes]
    assert {n.meta["dtype"] for n in small.graph.nodes if n.op == "get_attr"} == {torch.float32}


def test_sizes_of_any_name() -> None:
    program = one_call(aten.max_pool2d.default, {"x": ("B", 3, "H", "W")}, "$x", [2, 2])
    derive(program)
    height, width = symbol("H"), symbol("W")
    shape = program.outputs["y"].meta["shape"]
    assert shape[:2] == (B, 3)
    assert [int(d.subs({height: 9, width: 6})) for d in shape[2:]] == [4, 3]


def test_several_results_have_several_shapes() -> None:
    program = one_call(aten.topk.default, {"x": ("B", 8)}, "$x", 2)
    derive(program)
    topk = program.outputs["y"]
    assert topk.meta["shape"] == ((B, 2), (B, 2))
    assert topk.meta["dtype"] == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (one_call(aten.mm.default, {"x": ("B", 4), "w": (5, 6)}, "$x", "$w"), "%mm.* does not fit"),
        (one_call(aten.add.Tensor, {"x": ("B", 4), "w": (7, 4)}, "$x", "$w"), "holds only for B = 7|does not fit"),
        (one_call(aten.add.Tensor, {"x": ("B", "T"), "w": ("T", "B")}, "$x", "$w"), "holds only for|does not fit"),
        (one_call(aten.nonzero.default, {"x": ("B", 4)}, "$x"), "depends on the data"),
        (one_call(aten.view.default, {"x": ("B", 4)}, "$x", [11, 4]), "%view.*holds only for B = 11"),
    ],
)
def test_what_does_not_fit_is_refused(program: Program, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        derive(program)


def test_an_undescribed_input_is_refused() -> None:
    program = affine_layer()
    program.facts = {}
    with pytest.raises(SmeltError, match=r'input "x" has no shape; describe it in facts\["inputs"\]'):
        derive(program)
    for broken in (3, {"shape": "B", "dtype": "float32"}, {"shape": ["2 B"], "dtype": "float32"}, {"shape": [3]}):
        program.facts = {"inputs": {"x": broken}}
        with pytest.raises(SmeltError, match="is not like"):
            derive(program)
