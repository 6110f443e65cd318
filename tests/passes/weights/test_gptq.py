"""weights.gptq: the textbook recurrence, less error than rounding, what singular moments need, and taking up again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.ops import EMBEDDING, HEAD, LINEAR, arguments
from smelt.passes._walk import Walk
from smelt.passes.base import Checkpoints, Samples
from smelt.passes.weights import gptq
from smelt.passes.weights._gptq import solve
from smelt.passes.weights._matrices import siblings
from smelt.passes.weights._moments import Attended
from smelt.passes.weights._range import encode, fit
from smelt.passes.weights.gptq import Gptq

from ..families import captured, random_tokens


def inputs(width: int, seed: int = 0) -> torch.Tensor:
    """Correlated float64 [512, K]."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(512, width, generator=random, dtype=torch.float64)
    return base @ torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5


def matrix(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_the_book(weight: torch.Tensor, hessian: torch.Tensor, encoding: Affine, damp: float) -> torch.Tensor:
    """Optimal brain quantization in fixed order: the inverse of what is left of H is made anew for each column."""
    left = weight.double().clone()
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    group = encoding.group or weight.shape[1]
    out = torch.empty_like(left)
    for i in range(weight.shape[1]):
        if i % group == 0:
            steps = fit(left[:, i : i + group].float().contiguous(), encoding, "absmax")
        column = left[:, i : i + 1].float()
        out[:, i : i + 1] = steps.values(steps.codes(column)).double()
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (left[:, i] - out[:, i]) / inverse[0, 0]
        left[:, i:] -= error[:, None] * inverse[0]
    return out.float()


@pytest.mark.parametrize(("group", "zero"), [(0, False), (32, False), (32, True)])
def test_the_recurrence_is_the_one_of_the_book(group: int, zero: bool) -> None:
    x, weight, encoding = inputs(160), matrix(6, 160), Affine(4, group, zero=zero)
    hessian = 2 / len(x) * x.T @ x
    found = encoding.decode(solve(weight, hessian, encoding, "absmax", False, 0.01).parts, (6, 160))
    wanted = by_the_book(weight, hessian, encoding, 0.01)
    same = (found - wanted).abs() < 1e-6
    assert same.float().mean() > 0.999  # where a value lies between two codes, float32 may choose the other
    plain = encoding.decode(encode(weight, encoding, "absmax"), (6, 160))
    assert ((plain - wanted).abs() < 1e-6).float().mean() < 0.9  # the bound tells the two apart


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_of_the_product_is_lost_than_by_rounding(bits: int, order: bool) -> None:
    x, weight, encoding = inputs(128), matrix(32, 128), Affine(bits, 64)
    hessian = 2 / len(x) * x.T @ x
    solved = solve(weight, hessian, encoding, "mse", order, 0.01)
    lost = (weight.double() - encoding.decode(encode(weight, encoding, "mse"), (32, 128)).double()) @ x.T
    whole = weight.double() @ x.T
    assert solved.error < 0.6 * float(lost.square().sum() / whole.square().sum())
    mine = (weight.double() - encoding.decode(solved.parts, (32, 128)).double()) @ x.T
    assert solved.error == pytest.approx(float(mine.square().sum() / whole.square().sum()), rel=1e-6)


def test_ranges_lower_the_error_that_they_are_fitted_to() -> None:
    x = matrix(64, 128)
    x[:, 0] *= 8
    for rule, power in (("mse", 2.4), ("hqq", 0.7)):
        encoding = Affine(3, 64, zero=rule == "hqq")
        groups = x.unflatten(1, (2, 64))
        spans, fitted = fit(groups, encoding, "absmax"), fit(groups, encoding, rule)
        assert (fitted.error(groups, power) <= spans.error(groups, power)).all()
        assert fitted.error(groups, power).sum() < 0.98 * spans.error(groups, power).sum()


def test_steps_are_those_of_the_encoding() -> None:
    x = matrix(8, 64)
    groups = x.unflatten(1, (2, 32))
    for zero in (False, True):
        encoding = Affine(4, 32, zero=zero)
        steps = fit(groups, encoding, "absmax")
        held = encoding.decode(encode(x, encoding, "absmax"), (8, 64))
        assert torch.equal(steps.values(steps.codes(groups)).view_as(x), held)
        if zero:
            assert torch.equal(held, encoding.decode(encoding.alone(x), (8, 64)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_largest_weight_is_the_lowest_code(bits: int) -> None:
    encoding = Affine(bits, 64)
    groups = matrix(64, 64)
    steps = fit(groups, encoding, "absmax")
    largest, codes = groups.abs().argmax(1, keepdim=True), steps.codes(groups)
    assert not codes.gather(1, largest).any() and 0 < (steps.scale > 0).sum() < 64
    torch.testing.assert_close(steps.values(codes).gather(1, largest), groups.gather(1, largest), rtol=1e-3, atol=0)
    plain = encoding.decode(encoding.alone(groups), (64, 64))  # which leaves that code out
    error, theirs = ((value - groups).square().mean() for value in (steps.values(codes), plain))
    assert error < 0.9 * theirs


def test_singular_moments_are_damped_and_dead_inputs_do_not_matter() -> None:
    x = inputs(64)[:20]  # fewer tokens than inputs
    x[:, 10] = 0
    weight, encoding, hessian = matrix(4, 64), Affine(4, 32), 2 / 20 * x.T @ x
    solved = solve(weight, hessian, encoding, "absmax", False, 0.0)
    assert solved.damp > 0
    assert encoding.decode(solved.parts, (4, 64))[:, 10].abs().max() == 0
    with pytest.raises(SmeltError, match="stay singular"):
        solve(weight, -hessian, encoding, "absmax", False, 0.01)


def test_products_of_one_tensor_are_solved_and_the_rest_is_told() -> None:
    program = captured("llama")
    outcome = Gptq(group=32).apply(program, Samples(random_tokens(8, 32)))
    done = {str(arguments(node)["weight"].target) for node in program.calls(LINEAR)}
    tables = {str(arguments(node)["weight"].target) for node in program.calls(HEAD, EMBEDDING)}
    assert set(outcome.done) == done | tables
    assert {program.weights[name].encoding for name in done} == {Affine(4, 32)}
    assert {program.weights[name].encoding for name in tables} == {Affine(8, 32)}
    assert set(outcome.done) | outcome.skipped.keys() == program.weights.keys()


def test_tokens_count_by_the_attention_that_they_get() -> None:
    program, tokens = captured("llama"), random_tokens(3, 16)
    weighted = Attended(Walk(program, Samples(tokens)), 0.1)
    (counts,) = weighted.counts(siblings(program)[0]) or ()
    assert counts.shape == tokens.shape
    torch.testing.assert_close(counts.mean(1), torch.ones(3))
    ratio = counts.amin(1) / counts.amax(1)
    torch.testing.assert_close(ratio, torch.full((3,), 0.1))
    assert (counts.argmax(1) < 4).all()  # causal: early tokens are seen by more
    a, b = captured("llama"), captured("llama")
    for program, option in ((a, "alike"), (b, "attended")):
        Gptq(group=32, tokens=option).apply(program, Samples(tokens))
    assert any(a.weights[name].digest() != b.weights[name].digest() for name in a.weights)


class _Broken(Exception):
    pass


@pytest.mark.parametrize("tokens", ["alike", "attended"])
def test_a_run_that_was_broken_off_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    text = random_tokens(4, 16)
    options = Gptq(group=32, tokens=tokens)
    whole = captured("llama")
    options.apply(whole, Samples(text))

    solved: list[int] = []

    def counted(*args: object, **more: object) -> object:
        if len(solved) == 5:
            raise _Broken
        solved.append(1)
        return solve(*args, **more)

    monkeypatch.setattr(gptq, "solve", counted)
    samples = Samples(text, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(_Broken):
        options.apply(captured("llama"), samples)
    monkeypatch.setattr(gptq, "solve", solve)
    resumed = captured("llama")
    outcome = options.apply(resumed, samples)
    assert sum("resumed" in site for site in outcome.notes["sites"].values()) == 5
    assert {n: w.digest() for n, w in resumed.weights.items()} == {n: w.digest() for n, w in whole.weights.items()}
    other = dataclasses.replace(options, damp=0.02).apply(captured("llama"), samples)
    assert not any("resumed" in site for site in other.notes["sites"].values())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    samples = Samples(random_tokens(2, 16), checkpoints=Checkpoints(tmp_path / "file"))
    with pytest.raises(SmeltError, match="cannot be written"):
        Gptq(group=32).apply(captured("llama"), samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": -1}, "group is a count"),
        ({"damp": -0.1}, "damp is a share"),
        ({"least": 0.0}, "least is a share"),
        ({"range": "hqq"}, "say zero: true"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        Gptq(**options)
