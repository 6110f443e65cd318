"""prune.bottleneck: what was closed is what leaves, sizes are met exactly, and what does nothing leaves first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.ir.ops import EMBEDDING, HEAD, arguments
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes._walk import Walk
from smelt.passes.base import Checkpoints, Samples
from smelt.passes.measure import relative_error
from smelt.passes.prune._gates import KINDS, Place, find_places, gated
from smelt.passes.prune._size import Measure, Size, chosen, slices
from smelt.passes.prune._units import find_units
from smelt.passes.prune.bottleneck import Bottleneck
from smelt.passes.weights.quantize import Quantize

from ..families import answer, captured, random_tokens

SHORT = Bottleneck(share=0.3, multiple=1, steps=40, batch=8, length=16, checks=2, holdout=0.25, rate=5e-2)


def parameters(program: Program) -> int:
    return sum(math.prod(weight.shape) for weight in program.weights.values())


def tied() -> Program:
    """A llama whose head is the table of its lookup."""
    program = captured("llama")
    (table,) = (arguments(node)["weight"] for node in program.calls(EMBEDDING))
    (head,) = program.calls(HEAD)
    head.replace_input_with(arguments(head)["weight"], table)
    program.prune()
    return program


def samples(program: Program) -> Samples:
    return Samples(random_tokens(24, 16), source=program.fork())


def without(program: Program, places: Sequence[Place], kept: torch.Tensor, factors: torch.Tensor) -> Program:
    for place, units in zip(places, slices(places), strict=True):
        place.leave(program, kept[units], factors[units], None)
    derive(program)
    verify(program)
    return program


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_what_leaves_is_what_was_closed(family: str) -> None:
    """Factors, some of them 0, give what the smaller model gives, and its size is the formula's."""
    program = tied() if family == "tied" else captured(family)
    places, skipped = find_places(program, KINDS)
    assert len(places) == (8 if family == "gpt2" else 9)
    assert ("residual stream" in skipped) == (family == "gpt2")  # LayerNorms
    size, random = Size.of(program, places, "parameters"), torch.Generator().manual_seed(0)
    worth = torch.randn(slices(places)[-1].stop, generator=random)
    factors = torch.rand(len(worth), generator=random) + 0.5
    kept = chosen(places, size, worth, 0.6 * size.full, 1)
    part, names = gated(program, places)
    for place, units, name in zip(places, slices(places), names, strict=True):
        part.weights[name] = Weight.of((factors * kept)[units][place.index])
    tokens, full = random_tokens(2, 9), parameters(program)
    wanted = answer(part, tokens)
    assert relative_error(answer(program, tokens), wanted) > 1e-2
    smaller = without(program, places, kept, factors)
    assert relative_error(wanted, answer(smaller, tokens)) < 1e-5
    assert parameters(smaller) == float(size(kept)) <= 0.6 * full == 0.6 * size.full


@pytest.mark.parametrize("measure", ["parameters", "operations"])
def test_limits_are_met_to_the_unit(measure: Measure) -> None:
    """Less than a unit is missing to the limit, and what stays of a place is whole lots."""
    program = captured("llama")
    places, _ = find_places(program, KINDS)
    size = Size.of(program, places, measure)
    worth = torch.randn(slices(places)[-1].stop, generator=torch.Generator().manual_seed(1))
    for share in (0.1, 0.6):
        kept = chosen(places, size, worth, (1 - share) * size.full, 1)
        assert 0 <= (1 - share) * size.full - float(size(kept)) < 3 * 64  # a neuron
    kept = chosen(places, size, worth, 0.5 * size.full, 16)
    for place, units in zip(places, slices(places), strict=True):
        assert len(place.index) == 1 or int(kept[units][place.index].sum()) % 16 == 0
    with pytest.raises(SmeltError, match=r"is the least that can be left, and 0 are asked for: lower the share"):
        chosen(places, size, worth, 0.0, 1)


def test_what_does_nothing_leaves_first(tmp_path: Path) -> None:
    """Gates find the neurons that nobody reads; without them the model is the same, and so it is after a kill."""
    program = captured("llama")
    for site in find_units(program)[0]:
        value = program.weights[site.consumer_weight].dense() * 4
        if site.kind == "neurons":
            value[:, 1::2] = 0
        program.weights[site.consumer_weight] = Weight.of(value)
    before, tokens, text = program.fork(), random_tokens(2, 9), samples(program)
    step = replace(SHORT, share=2 * 64 * 3 * 64 / parameters(program), gates=("neurons",), correct=True)
    broken = replace(text, checkpoints=Checkpoints(tmp_path), progress=_stop_at(9))
    with pytest.raises(KeyboardInterrupt):
        step.apply(program.fork(), broken)
    resumed = program.fork()
    outcome = step.apply(resumed, replace(broken, progress=text.progress))
    step.apply(program, text)
    assert outcome.notes["resumed_at"] == 9
    assert [outcome.notes["left"][name] for name in outcome.done] == [{"left": 64, "of": 128}] * 2
    assert relative_error(answer(before, tokens), answer(program, tokens)) < 1e-3  # of a damped fit
    assert torch.equal(answer(program, tokens), answer(resumed, tokens))
    assert outcome.notes["bytes"]["after"] == program.nbytes < outcome.notes["bytes"]["before"]


def _stop_at(last: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done == last:
            raise KeyboardInterrupt

    return progress


def test_a_second_run_finds_nothing_left_to_do() -> None:
    program = captured("llama")
    step = replace(SHORT, steps=1, checks=1, gates=("neurons", "blocks"))
    assert step.apply(program, samples(program)).done
    before = dict(program.weights)
    assert not step.apply(program, samples(program)).done
    assert program.weights == before


def test_correction_fits_what_is_left() -> None:
    """Refitted readers come nearer to the model than scaled ones do."""
    program, tokens = captured("llama"), random_tokens(8, 16)
    places, _ = find_places(program, ("neurons",))
    size = Size.of(program, places, "parameters")
    worth = torch.randn(slices(places)[-1].stop, generator=torch.Generator().manual_seed(2))
    kept = chosen(places, size, worth, 0.8 * size.full, 1)
    wanted, errors = answer(program, tokens), []
    for walk in (False, True):
        part = program.fork()
        given = Walk(part, Samples(tokens)) if walk else None
        for place, units in zip(find_places(part, ("neurons",))[0], slices(places), strict=True):
            place.leave(part, kept[units], torch.ones(int(kept[units].numel())), given)
        errors.append(float((answer(part, tokens) - wanted).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_what_cannot_be_pruned_is_named() -> None:
    program = captured("llama")
    assert not list(SHORT.requires(program))
    Quantize(bits=8, group=32, smallest=32).apply(program, None)
    assert "must be Dense" in next(SHORT.requires(program))
    with pytest.raises(SmeltError, match=r"share is above 0 and below 1, but is 1.5"):
        Bottleneck(share=1.5)
