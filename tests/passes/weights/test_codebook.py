"""weights.codebook and weights.factor: errors on sample text fall as they must, bits are counted, runs are taken up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.ir.encoding import Affine, LowRank, Sum
from smelt.ir.encoding import Codebook as Books
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import EMBEDDING, HEAD, LINEAR, arguments
from smelt.passes.base import Checkpoints, Samples
from smelt.passes.weights import _gptq, _in_order
from smelt.passes.weights._books import solve
from smelt.passes.weights._gptq import lost
from smelt.passes.weights.codebook import Codebook
from smelt.passes.weights.factor import Factor

from ..families import captured, random_tokens


def moments(width: int, seed: int = 0) -> torch.Tensor:
    """Of correlated inputs, float64 [K, K]."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(512, width, generator=random, dtype=torch.float64)
    x = x @ torch.randn(width, width, generator=random, dtype=torch.float64) / width**0.5
    return 2 / 512 * x.T @ x


def matrix(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def term(dims: int, bits: int, **more: Any) -> Books:
    return Books(dims, bits, shared=True, norm=True, **more)


ENCODINGS = {
    "a table": term(1, 2),
    "banks": term(1, 2, banks=4),
    "pairs": term(2, 4),
    "a sum": Sum((term(4, 4), term(4, 4))),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_stage_loses_less_of_the_products(name: str) -> None:
    """k-means, codes that carry errors on, and codes, books and scales in turn."""
    weight, hessian, encoding = matrix(96, 128), moments(128), ENCODINGS[name]
    plain = lost(weight, encoding.decode(encoding.alone(weight), (96, 128)), hessian)
    carried, fitted = (solve(weight, hessian, encoding, 0.01, rounds) for rounds in (0, 3))
    assert carried.error < 0.85 * plain and fitted.error < 0.85 * carried.error
    again = encoding.decode(fitted.parts, (96, 128))  # what is stored is what was measured
    assert fitted.error == pytest.approx(lost(weight, again, hessian), rel=1e-6)
    assert 8 * sum(p.numel() * p.itemsize for p in fitted.parts.values()) == (
        encoding.stored_bits((96, 128)) + encoding.table_bits((96, 128))
    )


def test_the_moments_of_the_text_are_what_is_fitted_to() -> None:
    weight, hessian, encoding = matrix(64, 128), moments(128), term(2, 4)
    alike = solve(weight, torch.eye(128, dtype=torch.float64), encoding, 0.01, 3)
    lost_alike = lost(weight, encoding.decode(alike.parts, (64, 128)), hessian)
    assert solve(weight, hessian, encoding, 0.01, 3).error < 0.7 * lost_alike


def test_errors_fall_with_bits_and_below_integers() -> None:
    weight, hessian = matrix(128, 128), moments(128)
    errors = [solve(weight, hessian, term(2, bits), 0.01, 2).error for bits in (2, 4, 6)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]
    integers = _gptq.solve(weight, hessian, Affine(2, 0), "mse", True, 0.01)
    assert errors[1] < 0.7 * integers.error


def test_inputs_that_never_come_do_not_matter() -> None:
    hessian, weight = moments(64), matrix(16, 64)
    hessian[10], hessian[:, 10] = 0, 0
    assert solve(weight, hessian, term(2, 4), 0.0, 2).error < 0.2
    assert solve(weight, torch.zeros(64, 64, dtype=torch.float64), term(2, 4), 0.01, 1).error == 0.0


@pytest.mark.parametrize("base", [Affine(2, 64), term(2, 4)])
def test_a_product_takes_what_the_base_misses(base: Books | Affine) -> None:
    weight = matrix(64, 128) + 4 * matrix(64, 3) @ matrix(3, 128, 2)
    hessian = moments(128)
    alone = Factor(base=base, rank=4, loops=1).solve(weight, hessian)
    turned = Factor(base=base, rank=4, loops=3).solve(weight, hessian)
    none = (
        _gptq.solve(weight, hessian, base, "mse", True, 0.01)
        if isinstance(base, Affine)
        else solve(weight, hessian, base, 0.01, 4)
    )
    assert turned.error < alone.error < none.error and turned.error < 0.6 * none.error
    assert turned.encoding == Sum((base, LowRank(4)))


def test_as_many_directions_as_the_energy_asks_for() -> None:
    weight, hessian = matrix(64, 128), moments(128)
    ranks = []
    for energy in (0.05, 0.3, 1.0):
        found = Factor(base=Affine(2, 64), rank=24, energy=energy, loops=1).solve(weight, hessian).encoding
        assert isinstance(found, Sum) and isinstance(found.terms[1], LowRank)
        ranks.append(found.terms[1].rank)
    assert ranks[0] < ranks[1] < ranks[2] == 24


@pytest.mark.parametrize(
    "options",
    [Codebook(dims=2, bits=4, rounds=1), Factor(base=term(2, 4), rank=2, rounds=1, loops=1)],
)
def test_products_are_solved_and_the_rest_is_told(options: Codebook | Factor) -> None:
    program, tokens = captured("llama"), random_tokens(4, 16)
    whole = captured("llama")
    outcome = options.apply(program, Samples(tokens))
    done = {str(arguments(node)["weight"].target) for node in program.calls(LINEAR)}
    tables = {str(arguments(node)["weight"].target) for node in program.calls(HEAD, EMBEDDING)}
    assert {program.weights[name].encoding for name in done} == {options.encoding}
    assert set(outcome.done) | outcome.skipped.keys() == program.weights.keys()
    assert not any(isinstance(program.weights[name].encoding, Books | Sum) for name in tables)
    given = {"tokens": tokens, "positions": torch.arange(16).expand(4, 16)}
    logits = [interpret(each, given)["logits"] for each in (program, whole)]
    assert 0 < (logits[0] - logits[1]).norm() / logits[1].norm() < 0.6


class _Broken(Exception):
    pass


def test_a_run_that_was_broken_off_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, options = random_tokens(4, 16), Codebook(dims=2, bits=4, rounds=0)
    whole = captured("llama")
    options.apply(whole, Samples(text))
    told, count = _in_order._told, [0]

    def counted(*args: Any) -> dict[str, Any]:
        count[0] += 1
        if count[0] > 3:
            raise _Broken
        return told(*args)

    monkeypatch.setattr(_in_order, "_told", counted)
    samples = Samples(text, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(_Broken):
        options.apply(captured("llama"), samples)
    monkeypatch.setattr(_in_order, "_told", told)
    resumed = captured("llama")
    outcome = options.apply(resumed, samples)
    assert sum("resumed" in site for site in outcome.notes["sites"].values()) == 3
    assert {n: w.digest() for n, w in resumed.weights.items()} == {n: w.digest() for n, w in whole.weights.items()}


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (Codebook, {"dims": 0}, "dims must be"),
        (Codebook, {"bits": 7}, "bits of a code"),
        (Codebook, {"books": 0}, "books is a number"),
        (Codebook, {"banks": 300}, "banks is a number"),
        (Codebook, {"rounds": -1}, "rounds is a count"),
        (Factor, {"rank": 0}, "rank must be"),
        (Factor, {"energy": 0.0}, "energy is a share"),
        (Factor, {"loops": 0}, "loops is a positive"),
        (Factor, {"base": LowRank(4)}, "base is affine"),
        (Factor, {"base": Books(2, 4)}, "base is affine"),
    ],
)
def test_options_that_mean_nothing(made: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        made(**options)


def test_without_text_and_with_shapes_that_do_not_fit() -> None:
    with pytest.raises(SmeltError, match="needs sample texts"):
        Codebook().apply(captured("llama"), None)
    outcome = Codebook(dims=3).apply(captured("llama"), Samples(random_tokens(2, 16)))
    assert any("do not divide a row" in why for why in outcome.skipped.values())
