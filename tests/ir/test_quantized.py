"""Rounded activations: what the op means at the edges, its shape and its cost."""

from __future__ import annotations

import pytest
import sympy
import torch

from smelt.ir.cost import cost
from smelt.ir.ops import QUANTIZED
from smelt.ir.shapes import derive, symbol

from .programs import one_call

OP = QUANTIZED.target


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def steps(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The scale of every value's group."""
    return x.unflatten(-1, (-1, group)).abs().amax(-1).repeat_interleave(group, -1) / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [1, 4, 32, 96])
def test_values_are_whole_steps_and_half_a_step_away_at_most(bits: int, group: int) -> None:
    x = random(3, 5, 96)
    y, step = OP(x, bits, group), steps(x, bits, group)
    assert ((y - x).abs() <= step * 0.50001).all()
    codes = y / step
    assert (codes - codes.round()).abs().max() < 1e-4 and codes.abs().max() < 2 ** (bits - 1) - 0.9
    coarse = OP(x, bits - 1, group)
    assert group == 1 or not ((coarse - x).abs() <= step * 0.50001).all()  # and one bit fewer is seen


def test_the_greatest_of_a_group_is_kept() -> None:
    x = random(7, 64)
    groups, kept = x.view(7, 2, 32), OP(x, 8, 32).view(7, 2, 32)
    at = groups.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(kept.gather(-1, at), groups.gather(-1, at), rtol=2e-7, atol=0)


def test_a_group_of_0_is_the_whole_row() -> None:
    x = random(4, 48)
    assert torch.equal(OP(x, 8, 0), OP(x, 8, 48)) and not torch.equal(OP(x, 8, 0), OP(x, 8, 16))


def test_zeros_ties_and_what_is_no_number() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [127.0, 0.5, 1.5, -2.5], [1.0, float("nan"), 2.0, 3.0]])
    y = OP(x, 8, 4)
    assert y[0].tolist() == [0.0] * 4 and y[1].tolist() == [127.0, 0.0, 2.0, -2.0]  # ties to even
    assert y[2].isnan().all()


def test_half_precision_is_rounded_once_more() -> None:
    x = random(3, 64).half()
    y = OP(x, 8, 32)
    assert y.dtype is torch.float16 and torch.equal(y, OP(x.float(), 8, 32).half())


def test_the_shape_is_that_of_the_input() -> None:
    program = one_call(OP, {"x": ("B", "T", 64)}, "$x", 8, 32)
    derive(program)
    (node,) = program.calls(QUANTIZED)
    assert node.meta["shape"] == (symbol("B"), symbol("T"), 64) and node.meta["dtype"] is torch.float32
    turned = random(64, 3).t()
    assert OP(turned, 8, 32).is_contiguous() and OP(turned.to("meta"), 8, 32).is_contiguous()


def test_the_cost_is_that_of_pointwise_work() -> None:
    found = cost(one_call(OP, {"x": ("B", "T", 64)}, "$x", 8, 32))
    assert found.product_flops == 0
    assert sympy.expand(QUANTIZED.cost((symbol("B"), 64), 8, 32).flops) == 256 * symbol("B")
