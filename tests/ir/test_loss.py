"""The cut cross-entropy: loss and gradients of the reference at ragged shapes, without a tensor of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smelt.ir.ops import loss
from smelt.ir.ops.loss import HEAD_CROSS_ENTROPY, NARROW, head_cross_entropy

OP = HEAD_CROSS_ENTROPY.target
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}  # of the largest; bfloat16: 8 bits in the gradients
SHAPES = [(1, 1, 1), (3, 5, 2), (63, 300, 16), (129, 2 * NARROW + 1, NARROW + 3)]


def problem(n: int, v: int, k: int, dtype: torch.dtype = torch.float32, biased: bool = True) -> list[Any]:
    """x, weight, labels (every fifth ignored) and bias."""
    random = torch.Generator().manual_seed(n + v)
    x, weight = (torch.randn(*shape, generator=random).to(dtype) for shape in ((n, k), (v, k)))
    labels = torch.randint(v, (n,), generator=random)
    labels[1::5] = -100
    return [x.requires_grad_(), weight.requires_grad_(), labels, torch.randn(v, generator=random).requires_grad_()]


def results(call: Any, given: list[Any], **options: Any) -> list[torch.Tensor]:
    """The losses and the gradients of their mean weighted by place."""
    value = call(*given, **options)
    weights = torch.linspace(1, 2, len(value))
    leaves = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad((value * weights).mean(), leaves)]


def error(n: int, v: int, k: int, dtype: torch.dtype = torch.float32, **options: Any) -> float:
    """The largest difference from the reference, as a part of the largest entry."""
    given = problem(n, v, k, dtype)
    got, want = results(OP, given, **options), results(head_cross_entropy, given, **options)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    differences = [(g - w).abs().nan_to_num(nan=torch.inf).max() for g, w in zip(got, want, strict=True)]
    return max(float(d / w.abs().max().clamp(min=1e-3)) for d, w in zip(differences, want, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
def test_blocks_give_the_loss_and_gradients_of_the_reference(shape: tuple[int, int, int], options: Any) -> None:
    assert error(*shape, **options) < TOLERANCE[torch.float32]


def test_any_label_can_be_the_ignored_one() -> None:
    given = problem(63, 300, 16)
    given[2] = given[2].clamp(min=0)
    got, want = results(OP, given, ignore=0), results(head_cross_entropy, given, ignore=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE[torch.float32], rtol=1e-5)


@pytest.mark.parametrize("label", [-1, 300])
def test_a_label_outside_of_the_vocabulary_is_an_error(label: int) -> None:
    given = problem(63, 300, 16)
    given[2][7] = label
    with pytest.raises(IndexError):
        OP(*given)


def test_halves_keep_their_type() -> None:
    assert error(63, 300, 16, torch.bfloat16) < TOLERANCE[torch.bfloat16]


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, weight, labels, _ = problem(7, 300, 16)
    (dx,) = torch.autograd.grad(OP(x, weight.detach(), labels).sum(), [x])
    (want,) = torch.autograd.grad(head_cross_entropy(x, weight.detach(), labels).sum(), [x])
    torch.testing.assert_close(dx, want)
    (dweight,) = torch.autograd.grad(OP(x.detach(), weight, labels).sum(), [weight])
    (want,) = torch.autograd.grad(head_cross_entropy(x.detach(), weight, labels).sum(), [weight])
    torch.testing.assert_close(dweight, want)


def test_tokens_that_are_all_ignored_cost_nothing() -> None:
    x, weight, labels, bias = problem(5, 300, 16)
    got = results(OP, [x, weight, torch.full_like(labels, -100), bias])
    assert all(float(tensor.abs().max()) == 0 for tensor in got)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def largest(call: Any, n: int, v: int, k: int) -> int:
    """Elements of the largest tensor made by the call and its gradients."""
    given = problem(n, v, k)
    with Largest() as mode:
        results(call, given, softcap=9.0)
    return mode.elements


def test_no_tensor_holds_all_logits() -> None:
    n, v, k = 300, 3000, 16
    assert largest(head_cross_entropy, n, v, k) >= n * v  # the count sees them where they are
    assert largest(OP, n, v, k) == max(n * NARROW, v * k)


@pytest.mark.parametrize("mutant", ["scale", "row", "cap"])
def test_the_comparison_catches_a_wrong_block(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss._blocks

    def wrong(x: Any, weight: Any, bias: Any, softcap: Any) -> Any:
        for part, logits in right(x, weight, bias, None if mutant == "cap" else softcap):
            if mutant == "scale":
                logits *= 1.05
            if mutant == "row":
                logits[:, -1] = -1e9
            yield part, logits

    monkeypatch.setattr(loss, "_blocks", wrong)
    assert error(63, 300, 16, softcap=5.0) > 100 * TOLERANCE[torch.float32]


def test_shape_and_cost() -> None:
    x, weight, labels, bias = (tensor.detach().to("meta") for tensor in problem(7, 300, 16))
    out = OP(x, weight, labels, bias)
    assert out.shape == (7,) and out.dtype is torch.float32
    n, v, k = sympy.symbols("n v k")
    assert sympy.expand(HEAD_CROSS_ENTROPY.cost((n, k), (v, k), (n,)).flops - (2 * n * v * k + 3 * n * v)) == 0
