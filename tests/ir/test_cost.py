"""Costs: products as torch counts them in a real run, bytes by formula, and a wrong count is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

from smelt.ir.cache import Select
from smelt.ir.cost import Costs, cost
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import symbol

from .programs import FAMILIES, affine_layer, cached, captured, one_call, quantized

aten = torch.ops.aten
B, T, S = symbol("B"), symbol("T"), symbol("S")


def counted(program: Program, inputs: dict[str, torch.Tensor]) -> int:
    """Flops of matrix products that torch counts while the program is interpreted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        interpret(program, inputs)
    return int(counter.get_total_flops())


def agrees(costs: Costs, program: Program) -> bool:
    """Whether the symbolic count of products is torch's at two sizes."""
    return all(
        costs.product_flops.subs({B: batch, T: length, S: 0})
        == counted(program, dict.fromkeys(program.inputs, torch.zeros(batch, length, dtype=torch.int64)))
        for batch, length in ((2, 5), (3, 9))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_what_torch_counts(family: str) -> None:
    program = captured(family)
    assert agrees(cost(program), program)
    program = cached(program)
    assert agrees(cost(program), program)


@pytest.mark.parametrize("scale", [1.05, 0, 2])
def test_a_wrong_count_is_noticed(scale: float) -> None:
    program = captured("llama")
    costs = cost(program)
    last = costs.nodes[-1]
    assert last.op == "smelt.head"
    wrong = Costs((*costs.nodes[:-1], replace(last, flops=last.flops * scale)))
    assert not agrees(wrong, program)


_X = {"x": ("B", 6, 8), "y": ("B", 8, 5), "w": (8, 5), "b": ("B", 6, 5)}
_IMAGE = {"x": ("B", 4, 9, 7), "w": (6, 2, 3, 2), "v": (4, 3, 3, 2)}


@pytest.mark.parametrize(
    ("program", "product"),
    [
        (one_call(aten.bmm.default, _X, "$x", "$y"), True),
        (one_call(aten.baddbmm.default, _X, "$b", "$x", "$y"), True),
        (one_call(aten.matmul.default, _X, "$x", "$w"), True),
        (one_call(aten.mm.default, {"x": ("B", 8), "w": (8, 5)}, "$x", "$w"), True),
        (one_call(aten.addmm.default, {"x": ("B", 8), "w": (8, 5), "b": (5,)}, "$b", "$x", "$w"), True),
        (one_call(aten.linear.default, {"x": ("B", 2, 8), "w": (5, 8), "b": (5,)}, "$x", "$w", "$b"), True),
        (one_call(aten.einsum.default, _X, "bij,bjk->bik", ["$x", "$y"]), True),
        (one_call(aten.einsum.default, _X, "...ij,jk->...ik", ["$x", "$w"]), True),
        (one_call(aten.conv2d.default, _IMAGE, "$x", "$w", None, [2, 1], [1, 1], [1, 1], 2), True),
        (one_call(aten.conv_transpose2d.input, _IMAGE, "$x", "$v", None, [2, 1]), True),
        (
            one_call(aten.convolution.default, _IMAGE, "$x", "$w", None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2),
            True,
        ),
        (one_call(aten.relu.default, _X, "$x"), False),
    ],
    ids=lambda value: list(value.graph.nodes)[-2].name if isinstance(value, Program) else "",
)
def test_products_of_aten_are_what_torch_counts(program: Program, product: bool) -> None:
    costs = cost(program)
    for batch in (2, 3):
        shapes = {n: [batch if d == "B" else d for d in i["shape"]] for n, i in program.facts["inputs"].items()}
        inputs = {name: torch.zeros(shape) for name, shape in shapes.items()}
        assert costs.product_flops.subs(B, batch) == counted(program, inputs)
    assert bool(costs.product_flops) is product
    assert costs.flops.subs(B, 2) == (costs.product_flops.subs(B, 2) if product else 2 * 6 * 8)


def test_weights_are_read_in_their_encoding() -> None:
    plain, small = captured("llama"), quantized(captured("llama"), Affine(4, 32))
    saved = cost(plain).evaluate().weight_bytes - cost(small).evaluate().weight_bytes
    assert saved == plain.nbytes - small.nbytes > 0


def test_only_the_rows_that_are_looked_up_count() -> None:
    program = captured("llama")
    tables = {"model.embed_tokens.weight", "model.rotary_emb.inv_freq"}
    whole = sum(weight.nbytes for name, weight in program.weights.items() if name not in tables)
    frequencies = 4 * 32  # read at each of four rotary nodes
    assert sympy.expand(cost(program).weight_bytes - (whole + frequencies + B * T * 64 * 4)) == 0


def test_only_chosen_experts_are_read() -> None:
    program = captured("mixtral")
    stacked = sum(w.nbytes for name, w in program.weights.items() if ".experts." in name)
    read = next(row for row in cost(program).table(T=1) if row.name == "smelt.experts").work.weight_bytes
    assert read == stacked // 2  # two of four for one token
    read = next(row for row in cost(program).table(T=16) if row.name == "smelt.experts").work.weight_bytes
    assert read == stacked


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tail": 64, "keys": Affine(8, 32, "channel"), "values": Affine(8, 16)},
        {"sink": 4, "tail": 32, "page": 32, "select": Select("key_norm", 0.5)},
        {"sink": 4, "tail": 32, "page": 32, "select": Select("recency", 1.0, 96)},
        {"sink": 4, "tail": 32, "page": 32, "select": Select("recency", 1.0, 0)},
    ],
)
def test_cache_bytes_are_the_plans_and_flops_see_what_is_stored(options: dict[str, Any]) -> None:
    program = cached(captured("llama"), **options)
    costs = cost(program)
    assert program.cache is not None
    for context in (0, 1, 36, 67, 68, 500):
        work = costs.evaluate(B=3, T=2, S=context)
        assert work.cache_bytes == 3 * program.cache.bits(context) / 8
        stored = sum(sum(site.counts(context)) for site in program.cache.sites)
        fresh = costs.evaluate(B=3, T=2, S=0).flops
        assert work.flops - fresh == 2 * 3 * 4 * 2 * stored * (16 + 16)


def test_rows_add_up_to_the_whole() -> None:
    costs = cost(cached(captured("gpt2")))
    for by in ("op", "node"):
        rows = costs.table(by=by, B=2, T=3, S=10)  # type: ignore[arg-type]
        assert tuple(map(sum, zip(*(row.work for row in rows), strict=True))) == costs.evaluate(B=2, T=3, S=10)
    names = [row.name for row in costs.table()]
    assert "smelt.linear" in names and "aten.view.default" not in names


def test_activations_of_one_layer() -> None:
    assert sympy.expand(cost(affine_layer()).activation_bytes - 4 * (B * 4 + B * 3)) == 0


def test_an_unknown_size_is_asked_for() -> None:
    costs = cost(one_call(aten.relu.default, {"x": ("B", "H")}, "$x"))
    assert costs.evaluate(B=2, H=7).flops == 14
    with pytest.raises(SmeltError, match="depends on H: give a number"):
        costs.evaluate()
