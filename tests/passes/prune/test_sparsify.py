"""prune.sparsify: exact densities, the recurrence of the book, what compensation gains, and taking up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import NM, Affine, Bitmap
from smelt.ir.errors import SmeltError
from smelt.ir.ops import EMBEDDING, HEAD, LINEAR, arguments
from smelt.passes.base import Checkpoints, Samples
from smelt.passes.prune import sparsify
from smelt.passes.prune._masks import Pattern, compensated
from smelt.passes.prune.sparsify import Sparsify
from smelt.passes.weights._gptq import lost
from smelt.passes.weights.gptq import Gptq
from smelt.passes.weights.quantize import Quantize

from ..families import captured, random_tokens

PATTERNS = {
    "rows": Pattern(0.5),
    "whole": Pattern(0.3, rows=False),
    "2:4": Pattern(keep=2, of=4),
    "1:8": Pattern(keep=1, of=8),
}


def second_moments(width: int, seed: int = 0) -> torch.Tensor:
    """Of correlated inputs, float64 [K, K]."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(512, width, generator=random, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5
    return 2 / len(x) * x.T @ x


def matrix(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_the_book(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, damp: float) -> torch.Tensor:
    """Optimal brain surgery in fixed order: the inverse of what is left of H is made anew for each column."""
    left, width = weight.double().clone(), weight.shape[1]
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[i:, i:]) for i in range(width)]
    spread = torch.stack([inverse[0, 0] for inverse in inverses])
    step = pattern.of or 128
    for i in range(width):
        if i % step == 0:
            removed = pattern.removed(left[:, i : i + step] ** 2 / spread[i : i + step], i)
        error = torch.where(removed[:, i % step], left[:, i], 0.0) / inverses[i][0, 0]
        left[:, i:] -= error[:, None] * inverses[i][0]
    return left.float()


@pytest.mark.parametrize("name", PATTERNS)
def test_the_recurrence_is_the_one_of_the_book(name: str) -> None:
    weight, hessian, pattern = matrix(6, 160), second_moments(160), PATTERNS[name]
    found, damped = compensated(weight, hessian, pattern, 0.01)
    wanted = by_the_book(weight, hessian, pattern, 0.01)
    assert damped == 0.01
    assert (found - wanted).abs().max() < 1e-3
    assert (wanted - weight.where(found != 0, torch.tensor(0.0))).abs().max() > 0.1  # kept weights have moved


@pytest.mark.parametrize("name", PATTERNS)
def test_densities_are_exact(name: str) -> None:
    pattern = PATTERNS[name]
    found, _ = compensated(matrix(32, 160), second_moments(160), pattern, 0.01)
    for zeros in (found == 0, pattern.removed(matrix(32, 160).abs())):
        if pattern.of:
            assert (zeros.unflatten(1, (-1, pattern.of)).sum(-1) == pattern.of - pattern.keep).all()
        elif pattern.rows:
            assert (zeros.sum(1) == 80).all()
        else:
            assert zeros.sum() == round(0.3 * 32 * 160)


@pytest.mark.parametrize("name", ["rows", "2:4"])
def test_less_of_the_product_is_lost_the_more_is_known(name: str) -> None:
    pattern = PATTERNS[name]
    for seed in range(4):
        weight, hessian = matrix(32, 128, seed + 10), second_moments(128, seed)
        order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
        loudness = torch.linspace(0.3, 3, 128, dtype=torch.float64)[order]
        hessian = hessian * loudness * loudness[:, None]
        magnitude = weight.masked_fill(pattern.removed(weight.abs()), 0)
        wanda = weight.masked_fill(pattern.removed(weight.abs() * hessian.diagonal().sqrt()), 0)
        sparsegpt, _ = compensated(weight, hessian, pattern, 0.01)
        a, b, c = (lost(weight, each, hessian) for each in (sparsegpt, wanda, magnitude))
        assert a < 0.95 * b and b < 0.8 * c


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        ({"share": 0.5}, Bitmap()),
        ({"pattern": "2:4", "score": "wanda"}, NM(2, 4)),
        ({"score": "magnitude", "scope": "whole"}, Bitmap()),
    ],
)
def test_products_are_pruned_and_the_rest_is_told(options: dict[str, object], encoding: NM | Bitmap) -> None:
    program, dense = captured("llama"), captured("llama")
    samples = (
        None if options["score" if "score" in options else "share"] == "magnitude" else Samples(random_tokens(8, 32))
    )
    outcome = Sparsify(**options).apply(program, samples)
    products = {str(arguments(node)["weight"].target) for node in program.calls(LINEAR)}
    tables = {str(arguments(node)["weight"].target) for node in program.calls(HEAD, EMBEDDING)}
    assert set(outcome.done) == products and tables <= outcome.skipped.keys()
    assert set(outcome.done) | outcome.skipped.keys() == program.weights.keys()
    for name in products:
        assert program.weights[name].encoding == encoding
        assert (program.weights[name].dense() == 0).float().mean() == 0.5
        assert program.weights[name].nbytes < 0.65 * 2 * dense.weights[name].dense().numel()


def test_what_is_kept_of_groups_takes_codes() -> None:
    text = Samples(random_tokens(8, 32))
    sparse = captured("llama")
    Sparsify(pattern="2:4").apply(sparse, text)
    nearest, solved = sparse.fork(), sparse.fork()
    products = {str(arguments(node)["weight"].target) for node in sparse.calls(LINEAR)}
    Quantize(bits=4, group=64).apply(nearest, None)
    assert not list(Gptq(group=64).requires(solved))
    notes = Gptq(group=64).apply(solved, text).notes["sites"]
    for name in products:
        mask = sparse.weights[name].dense() != 0
        for program in (nearest, solved):
            assert program.weights[name].encoding == NM(2, 4, Affine(4, 32))
            assert not program.weights[name].dense()[~mask].any()
        assert notes[name]["error"] < 0.03
    wide = captured("llama")
    Sparsify().apply(wide, text)
    assert "must be Dense, but are bitmap" in next(iter(Gptq(group=64).requires(wide)))


class _Broken(Exception):
    pass


def test_a_run_that_was_broken_off_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, whole, resumed = random_tokens(4, 16), captured("llama"), captured("llama")
    Sparsify().apply(whole, Samples(text))
    made: list[int] = []

    def counted(*args: object) -> object:
        if len(made) == 5:
            raise _Broken
        made.append(1)
        return compensated(*args)

    monkeypatch.setattr(sparsify, "compensated", counted)
    samples = Samples(text, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(_Broken):
        Sparsify().apply(captured("llama"), samples)
    monkeypatch.setattr(sparsify, "compensated", compensated)
    outcome = Sparsify().apply(resumed, samples)
    assert sum("resumed" in site for site in outcome.notes["sites"].values()) == 5
    assert {n: w.digest() for n, w in resumed.weights.items()} == {n: w.digest() for n, w in whole.weights.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2-4"}, "N:M such as 2:4, but is '2-4'"),
        ({"pattern": "4:2"}, "less than of=2"),
        ({"share": 1.0}, "share is above 0"),
        ({"damp": -1.0}, "damp is a share"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        Sparsify(**options)


def test_weights_that_are_not_numbers_are_named() -> None:
    program = captured("llama")
    name = next(str(arguments(node)["weight"].target) for node in program.calls(LINEAR))
    program.weights[name].parts["data"][0, 0] = float("nan")
    try:
        with pytest.raises(SmeltError, match=f"{name}: has NaN"):
            Sparsify(score="magnitude").apply(program, None)
    finally:
        program.weights[name].parts["data"][0, 0] = 0.0
