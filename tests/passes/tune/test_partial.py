"""PV-Tuning: an update changes few codes, to the nearest to what is wanted, and a training goes on where it was cut."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from smelt.ir.encoding import Affine, Codebook, Encoding, Sum, packing
from smelt.ir.errors import SmeltError
from smelt.ir.ops import LINEAR, arguments
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes.base import Checkpoints, Samples
from smelt.passes.train._checkpoint import Checkpoint
from smelt.passes.tune._partial import Partial
from smelt.passes.tune.recover import Recover

from ..families import captured, random_tokens

ROWS, COLUMNS = 8, 64
PAIR = Codebook(2, 3, shared=True, norm=True)
BANKED = Codebook(1, 3, shared=True, banks=2)
ENCODINGS = [Affine(2, 32, zero=True), Affine(3, 32), Codebook(4, 4, shared=True), BANKED, Sum((PAIR, PAIR))]
SHORT = {"steps": 24, "batch": 4, "length": 16, "rate": 4e-3, "checks": 3, "holdout": 0.25}


def noise(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def learning(encoding: Encoding) -> Partial:
    """A matrix in codes that should be another one."""
    weight = Weight.of(noise(0)).encoded(encoding)
    made = Partial.begun(weight, {part: value.clone() for part, value in weight.parts.items()}, 1.0)
    made.leaf.data += 0.4 * noise(1) / made.unit
    return made


def by_group(encoding: Encoding, value: torch.Tensor) -> torch.Tensor:
    term = encoding.terms[0] if isinstance(encoding, Sum) else encoding
    return value.reshape(-1, getattr(term, "dims", 1))


def least(weight: Partial, wanted: torch.Tensor) -> torch.Tensor:
    """The squared distance of each group of what is wanted to the nearest that codes can say, by trying all."""
    encoding = weight.encoding
    terms = {f"{letter}_": PAIR for letter in "ab"} if isinstance(encoding, Sum) else {"": encoding}
    bits, lanes = (encoding.width, 16) if isinstance(encoding, Affine) else (next(iter(terms.values())).bits, 1)
    first = int(isinstance(encoding, Affine) and not encoding.zero)  # symmetric codes leave the lowest out
    found = []
    for codes in itertools.product(range(first, 2**bits), repeat=len(terms)):
        parts = {part: weight.parts[part] for part in weight.parts}
        for prefix, code in zip(terms, codes, strict=True):
            count = len(by_group(encoding, wanted)) // ROWS
            packed = packing.pack(torch.full((ROWS, count), code, dtype=torch.int32), bits, lanes)
            parts |= {prefix + part: value for part, value in packed.items()}
        found.append(by_group(encoding, encoding.decode(parts, weight.shape) - wanted).square().sum(1))
    return torch.stack(found).amin(0)


def settles(encoding: Encoding, changes: float, given: float) -> None:
    """That an update with the share `given` keeps what is promised of the share `changes`."""
    weight = learning(encoding)
    before, wanted = weight.encoding.decode(weight.parts, weight.shape), weight.leaf.detach() * weight.unit
    weight.settle(given)
    after = weight.encoding.decode(weight.parts, weight.shape)
    moved = by_group(encoding, after != before).any(1)
    assert 0 < moved.sum() <= math.ceil(changes * len(moved))
    far = by_group(encoding, wanted - before).square().sum(1)
    chosen = torch.zeros_like(moved).index_fill(0, far.topk(math.ceil(changes * len(far))).indices, True)
    assert not (moved & ~chosen).any()
    now = by_group(encoding, wanted - after).square().sum(1)
    torch.testing.assert_close(now[chosen], least(weight, wanted)[chosen], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_few_change_and_those_to_the_nearest(encoding: Encoding) -> None:
    settles(encoding, 0.1, 0.1)
    with pytest.raises(AssertionError):
        settles(encoding, 0.1, 1.0)  # a share that is ignored is seen


def coded(encoding: Encoding) -> Program:
    program = captured("llama")
    for node in program.calls(LINEAR):
        name = str(arguments(node)["weight"].target)
        program.weights[name] = program.weights[name].encoded(encoding)
    return program


def samples(place: Path | None = None, cut: int = 0) -> Samples:
    def progress(done: int, total: int, what: str) -> None:
        if done == cut:
            raise RuntimeError("cut")

    where = Checkpoints(place) if place else None
    return Samples(random_tokens(64, 16), progress, checkpoints=where, source=captured("llama"))


@pytest.mark.parametrize(("encoding", "rate"), [(Affine(2, 32, zero=True), 8e-3), (Sum((PAIR, PAIR)), 4e-3)], ids=str)
def test_loss_falls_by_codes_alone(encoding: Encoding, rate: float) -> None:
    """The next of four integers is farther away than the next of 64 pairs."""
    program = coded(encoding)
    before = dict(program.weights)
    outcome = Recover(learn=("codes",), changes=0.05, **{**SHORT, "rate": rate}).apply(program, samples())
    assert outcome.notes["loss"]["after"] < outcome.notes["loss"]["before"] - 0.002
    for name, new in program.weights.items():
        old = before[name]
        assert (new.encoding, new.nbytes) == (old.encoding, old.nbytes)
        moved = {part for part, value in new.parts.items() if not torch.equal(value, old.parts[part])}
        assert {part.rpartition("_")[2] for part in moved} <= {"codes", "high"}


@pytest.mark.parametrize("encoding", [Affine(2, 32, zero=True), Sum((PAIR, PAIR))], ids=str)
def test_a_training_that_was_cut_goes_on_bit_for_bit(
    encoding: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    step = Recover(learn=("norms", "scales", "codes"), changes=0.05, **SHORT)
    whole, again = coded(encoding), coded(encoding)
    step.apply(whole, samples(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="cut"):
        step.apply(coded(encoding), samples(tmp_path / "cut", cut=7))
    outcome = step.apply(again, samples(tmp_path / "cut"))
    assert outcome.notes["resumed_at"] == 7 < outcome.notes["kept_update"]
    assert {n: w.digest() for n, w in again.weights.items()} == {n: w.digest() for n, w in whole.weights.items()}


def test_a_share_is_a_share() -> None:
    with pytest.raises(SmeltError, match=r"changes is a share of the codes above 0 and at most 1, not 1\.5"):
        Recover(changes=1.5)
