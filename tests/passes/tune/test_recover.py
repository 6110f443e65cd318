"""tune.recover: what learns and what stays, gradients through codes, and loss that falls with no byte added."""

from __future__ import annotations

import pytest
import torch

from smelt.ir.encoding import Affine, Codebook, Dense, LowRank, Sum
from smelt.ir.errors import SmeltError
from smelt.ir.ops import LINEAR, arguments
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes.activations.quantize import Quantize as Rounded
from smelt.passes.base import Samples
from smelt.passes.tune._learned import Learned, Through
from smelt.passes.tune._whole import Whole
from smelt.passes.tune.recover import Recover
from smelt.passes.weights.quantize import Quantize

from ..families import answer, captured, random_tokens


def rounded(bits: int = 2, zero: bool = False) -> Program:
    program = captured("llama")
    Quantize(bits=bits, group=32, smallest=32, zero=zero, head="keep").apply(program, None)
    return program


def samples(rows: int = 12, length: int = 16) -> Samples:
    return Samples(random_tokens(rows, length), source=captured("llama"))


SHORT = {"steps": 24, "batch": 4, "length": 16, "rate": 3e-2, "checks": 3, "holdout": 0.25}


def test_tables_and_thin_factors_learn_with_the_scales() -> None:
    encoding = Sum((Codebook(2, 3, shared=True, norm=True), LowRank(1)))
    program = captured("llama")
    coded = {str(arguments(node)["weight"].target) for node in list(program.calls(LINEAR))[:3]}
    program.weights |= {name: program.weights[name].encoded(encoding) for name in coded}
    before = dict(program.weights)
    outcome = Recover(learn=("scales",), **{**SHORT, "rate": 1e-2}).apply(program, samples(64))
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"]
    assert set(outcome.done) == coded
    for name in coded:
        old, new = before[name], program.weights[name]
        assert (new.encoding, new.nbytes) == (encoding, old.nbytes)
        moved = {part for part, value in new.parts.items() if not torch.equal(value, old.parts[part])}
        assert moved == {"a_book", "a_scale", "b_left", "b_right"}


@pytest.mark.parametrize(
    ("learn", "changed"),
    [
        (("norms",), {"vectors"}),
        (("scales",), {"scale"}),
        (("codes",), {"codes"}),
        (("scales", "codes"), {"scale", "codes"}),
        (("dense",), {"dense"}),
    ],
)
def test_loss_falls_and_nothing_else_changes(learn: tuple[str, ...], changed: set[str]) -> None:
    program = rounded()
    before = dict(program.weights)
    course = {**SHORT, "rate": 1e-2, "batch": 48} if "dense" in learn else SHORT
    outcome = Recover(learn=learn, **course).apply(program, samples(64))
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"] - 0.002
    found = set()
    for name, new in program.weights.items():
        old = before[name]
        assert (new.encoding, new.shape, new.nbytes) == (old.encoding, old.shape, old.nbytes)
        for part, value in new.parts.items():
            if not torch.equal(value, old.parts[part]):
                found.add("vectors" if len(new.shape) == 1 else "dense" if isinstance(new.encoding, Dense) else part)
    assert found == changed


@pytest.mark.parametrize(("zero", "even"), [(False, True), (False, False), (True, False)])
def test_rounding_lets_gradients_through_inside_the_range(zero: bool, even: bool) -> None:
    encoding = Affine(4, 32, zero=zero)
    value = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    parts = encoding.encode(value)
    held = {part: parts[part].float().requires_grad_() for part in ("scale", "zero") if part in parts}
    leaf = (value * 1.5).requires_grad_()  # some lie beyond the range
    weight = Through((3, 64), encoding, {"data": leaf, **held}, even)
    with torch.no_grad():
        lowest, highest = encoding.decode(parts, (3, 64)).amin(), encoding.decode(parts, (3, 64)).amax()
    assert (lowest <= weight.dense().min() or not (zero or even)) and weight.dense().max() <= highest
    weight.dense().sum().backward()
    assert leaf.grad is not None and set(leaf.grad.unique().tolist()) <= {0.0, 1.0}
    assert 0.05 < (leaf.grad == 0).float().mean() < 0.6
    scale = held["scale"]
    base = leaf.detach().view(3, 2, 32) - (held["zero"].detach()[..., None] if zero else 0)
    ratio = base / scale.detach()[..., None]
    low, high = (0, 15) if zero else (-7 if even else -8, 7)
    inside = (ratio > low) & (ratio < high)
    wanted = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high)).sum(-1)
    torch.testing.assert_close(scale.grad, wanted, atol=1e-4, rtol=1e-4)


def test_what_learns_begins_as_what_is_stored() -> None:
    for zero in (False, True):
        program = rounded(4, zero)
        learned = Learned.of(program, ("norms", "scales", "codes", "dense"))
        for name, weight in program.weights.items():
            torch.testing.assert_close(learned.part.weights[name].dense(), weight.dense(), atol=1e-6, rtol=1e-6)
        for name, weight in learned.stored(program.weights).items():
            assert weight.digest() == program.weights[name].digest(), name


def test_the_loss_is_that_of_the_whole_model() -> None:
    teacher, program, tokens = captured("llama"), rounded(), random_tokens(4, 16)
    whole = Whole.of(teacher, Learned.of(program, ("scales",)), tokens, tokens, 1.0, 0.0)
    wanted = torch.nn.functional.cross_entropy(answer(program, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert whole.check() == pytest.approx(float(wanted), rel=1e-5)
    same = Whole.of(teacher, Learned.of(captured("llama"), ("norms",)), tokens, tokens, 0.0, 1.0)
    far = Whole.of(teacher, Learned.of(program, ("norms",)), tokens, tokens, 0.0, 1.0)
    assert same.check() < far.check() - 0.01


def test_gradients_pass_rounded_activations() -> None:
    program = rounded()
    Rounded(bits=8, group=32).apply(program, None)
    outcome = Recover(**SHORT).apply(program, samples(64))
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"]


def test_what_cannot_be_trained_is_told() -> None:
    program = captured("llama")
    with pytest.raises(SmeltError, match="learn names nothing"):
        Recover(learn=())
    with pytest.raises(SmeltError, match="text is a share"):
        Recover(text=1.5)
    with pytest.raises(SmeltError, match="needs texts"):
        Recover().apply(program, None)
    assert not Recover(learn=("codes",), **SHORT).apply(program, samples()).done
    gemma = captured("gemma2")  # caps its logits
    assert any("something stands behind it" in why for why in Recover().requires(gemma))
    assert isinstance(program.weights[next(iter(program.weights))], Weight)
