"""prune.interpolate: what others stand in for leaves without loss, what is fitted beats what is not, shapes shrink."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.ops import ATTENTION, EMBEDDING, LINEAR, arguments
from smelt.ir.program import Program, Record
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples, catalogue
from smelt.passes.cache.insert import Insert
from smelt.passes.manager import StepFailed, run
from smelt.passes.measure import compare, relative_error
from smelt.passes.prune._interpolate import interpolation, pivots, selection, unexplained
from smelt.passes.prune._units import find_units
from smelt.passes.prune.interpolate import Interpolate
from smelt.recipes import Step

from ..families import Sketch, answer, captured, random_tokens, source_tokens

TOLERANCE = 1e-4  # float32 products whose weights a damped fit corrects
SHAPES = ((1, 1), (2, 7), (3, 5))
HALF = Interpolate(neurons=0.5, heads=0.5, ridge=1e-12)
FAMILIES = ("llama", "gpt2", "phi3", "opt", "gemma2", "cohere", "gpt_neox", "qwen3", "bert")


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_twins(program: Program) -> Program:
    """Every unit of the second half computes what one of the first half does, and is read with other weights."""
    for site in find_units(program)[0]:
        count = len(site.columns)
        for node, numbers in site.producers:
            unit = site.units_of(numbers)
            places = torch.stack([torch.nonzero(unit == u).flatten() for u in range(count)])
            for part in ("weight", "bias"):
                if (read := arguments(node)[part]) is not None:
                    value = program.weights[str(read.target)].dense().clone()
                    value[places[count // 2 :]] = value[places[: count // 2]]
                    program.weights[str(read.target)] = Weight.of(value)
    return program


def worst(before: Program, after: Program) -> float:
    return max(relative_error(answer(before, t), answer(after, t)) for t in (random_tokens(*s, seed=9) for s in SHAPES))


# the decomposition


def test_pivots_are_those_of_pivoted_qr():
    a = matrix(60, 12) @ torch.diag(0.7 ** torch.arange(12, dtype=torch.float64)) @ matrix(12, 12, seed=1)
    order, errors = pivots(a.T @ a, torch.arange(12)[:, None], 12)
    left = a.clone()
    for picked, error in zip(order.tolist(), errors.tolist(), strict=True):
        assert picked == int(left.norm(dim=0).argmax())
        direction = left[:, picked] / left[:, picked].norm()
        left = left - direction[:, None] * (direction @ left)
        assert error == pytest.approx(float(left.norm() / a.norm()), abs=1e-6)


def test_blocks_are_picked_by_what_is_left_of_them():
    a = torch.zeros(6, 6, dtype=torch.float64)
    a[0, 0], a[1, 1] = 3.0, 3.0  # unit 0: the largest
    a[0, 2], a[1, 3] = 2.9, 2.9  # unit 1: nearly as large, in the span of unit 0
    a[2, 4], a[3, 5] = 1.0, 1.0  # unit 2: small and new
    order, errors = pivots(a.T @ a, torch.arange(6).reshape(3, 2), 2)
    assert order.tolist() == [0, 2]
    assert errors[-1] == pytest.approx(0, abs=1e-6)


def test_a_unit_that_repeats_itself_is_no_obstacle():
    a = matrix(40, 2)[:, [0, 0, 1, 1]]
    order, errors = pivots(a.T @ a, torch.arange(4).reshape(2, 2), 2)
    assert sorted(order.tolist()) == [0, 1]
    assert errors[-1] == pytest.approx(0, abs=1e-6)


def test_the_fit_is_least_squares():
    a, kept = matrix(50, 8), torch.tensor([0, 3, 4])
    gram = a.T @ a
    t = interpolation(gram, kept, 1e-12)
    assert torch.allclose(t, torch.linalg.lstsq(a[:, kept], a).solution, atol=1e-9)
    assert unexplained(gram, kept, t) == pytest.approx(float((a - a[:, kept] @ t).norm() / a.norm()), abs=1e-9)
    assert unexplained(gram, kept, selection(gram, kept)) > 1.01 * unexplained(gram, kept, t)


def test_nothing_active_keeps_the_weights():
    gram, kept = torch.zeros(4, 4, dtype=torch.float64), torch.tensor([1, 2])
    assert torch.equal(interpolation(gram, kept, 1e-6), selection(gram, kept))
    assert len(pivots(gram, torch.arange(4)[:, None], 2)[0]) == 2


def test_a_ridge_that_is_too_small_says_so():
    gram = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(SmeltError, match=r"a ridge of 1e-300 leaves the fit singular; take a larger one"):
        interpolation(gram, torch.tensor([0, 1]), 1e-300)


# whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_leave_without_loss(family):
    program = with_twins(captured(family))
    pruned = program.fork()
    outcome = HALF.apply(pruned, Samples(random_tokens(16, 24)))
    verify(pruned)
    assert len(outcome.done) == 4
    assert not outcome.skipped
    assert worst(program, pruned) < TOLERANCE
    cut = program.fork()
    Interpolate(neurons=0.5, heads=0.5, correct=False).apply(cut, Samples(random_tokens(16, 24)))
    assert worst(program, cut) > 100 * TOLERANCE  # the correction is what does it


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_shrink_and_no_op_is_added(family):
    program = captured(family)
    pruned = program.fork()
    outcome = HALF.apply(pruned, Samples(random_tokens(4, 24)))
    assert [node.target for node in pruned.graph.nodes] == [node.target for node in program.graph.nodes]
    for site in find_units(program)[0]:
        for name in site.weights:
            before, after = program.weights[name].shape, pruned.weights[name].shape
            dim = 1 if name == site.consumer_weight else 0
            assert after[dim] * 2 == before[dim]
    assert outcome.notes["parameters"] == {
        name: sum(math.prod(weight.shape) for weight in each.weights.values())
        for name, each in (("before", program), ("after", pruned))
    }


def test_grouped_heads_leave_as_groups():
    program = captured("llama")
    Interpolate(neurons=0, heads=0.5).apply(program, Samples(random_tokens(4, 24)))
    shapes = [
        [arguments(n)[part].meta["shape"][1] for part in ("query", "key", "value")] for n in program.calls(ATTENTION)
    ]
    assert shapes == [[2, 1, 1]] * 2
    for tokens in (random_tokens(*shape) for shape in SHAPES):
        assert bool(answer(program, tokens).isfinite().all())


def test_a_pruned_decoder_generates_through_a_cache(llama, tokens):
    samples = Samples(tokens(8, 24))
    steps = [
        Step("prune.interpolate", "prune.interpolate", Interpolate(neurons=0.3, heads=0.5), {}),
        Step("cache.insert", "cache.insert", Insert("float32"), {}),
    ]
    result = run(llama, steps, samples)
    assert [(site.heads, site.kv_heads) for site in result.program.cache.sites] == [(2, 1)] * 2
    assert result.report.steps[1].divergence.max_error < TOLERANCE


def test_what_is_left_can_be_quantized(llama, tokens):
    steps = [Step(name, name, catalogue()[name](), {}) for name in ("prune.interpolate", "weights.quantize")]
    after = run(llama, steps, Samples(tokens(8, 24))).program
    down = after.weights["model.layers.0.mlp.down_proj.weight"]
    assert (down.shape, down.encoding) == ((64, 64), Affine(4, 0))


def test_experts_are_left_with_a_reason():
    outcome = Interpolate(heads=0.5).apply(captured("mixtral"), Samples(random_tokens(4, 24)))
    assert outcome.done == tuple(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))
    inside = "its neurons are inside routed experts"
    assert outcome.skipped == {f"model.layers.{i}.mlp.experts.down_proj": inside for i in (0, 1)}


def test_later_sites_see_what_earlier_ones_leave():
    """The second MLP is fitted to the activations of the model whose first is pruned."""
    samples, program = Samples(random_tokens(16, 24)), captured("opt")
    both, first, apart = program.fork(), program.fork(), program.fork()
    Interpolate(neurons=0.7, multiple=1).apply(both, samples)
    Interpolate(neurons=0.7, multiple=1, layers=(0,)).apply(first, samples)
    Interpolate(neurons=0.7, multiple=1, layers=(1,)).apply(apart, samples)
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        assert torch.equal(
            both.weights[f"model.decoder.layers.0.{name}"].dense(),
            first.weights[f"model.decoder.layers.0.{name}"].dense(),
        )
    name = "model.decoder.layers.1.fc2.weight"
    assert not torch.allclose(both.weights[name].dense(), apart.weights[name].dense(), atol=1e-4)


@pytest.mark.parametrize("part, dim", [("fc1", 0), ("fc2", 1)])
def test_magnitude_counts_what_is_written_and_what_is_read(part, dim):
    program, name = captured("opt"), f"model.decoder.layers.0.{part}.weight"
    value = program.weights[name].dense().clone()
    value.movedim(dim, 0)[32:96] *= 4
    program.weights[name] = Weight.of(value)
    up = program.weights["model.decoder.layers.0.fc1.weight"].dense()
    Interpolate(neurons=0.5, select="magnitude").apply(program, Samples(random_tokens(4, 24)))
    assert torch.equal(program.weights["model.decoder.layers.0.fc1.weight"].dense(), up[32:96])


@pytest.fixture(scope="module")
def reference(reference_path) -> Program:
    from smelt.ir.capture.hf import capture_hf

    return capture_hf(reference_path)


def test_orders_on_the_reference_model(reference, reference_path):
    samples = Samples(source_tokens(reference_path, "argparse ast subprocess tarfile", 32, 128))
    unseen = source_tokens(reference_path, "typing inspect", 6, 128)
    before = answer(reference, unseen)

    def kl(**options: Any) -> float:
        program = reference.fork()
        outcome = Interpolate(neurons=0.4, **options).apply(program, samples)
        assert outcome.notes["parameters"]["after"] / outcome.notes["parameters"]["before"] == pytest.approx(
            0.7445, abs=1e-3
        )
        assert {note["left"] for note in outcome.notes["sites"].values()} == {448}  # 460.8 to a multiple of 32
        return compare(before, answer(program, unseen)).kl

    stat, uncorrected = kl(), kl(correct=False)
    magnitude, refitted = kl(select="magnitude", correct=False), kl(select="magnitude")
    assert 0.02 < stat < 0.8 * uncorrected
    assert stat < 0.8 * refitted < refitted < magnitude


def test_a_global_bound_removes_as_much_elsewhere(reference, reference_path):
    program = reference.fork()
    samples = Samples(source_tokens(reference_path, "argparse", 16, 64))
    notes = Interpolate(neurons=0.4, budget="global").apply(program, samples).notes["sites"]
    left = [note["left"] for note in notes.values()]
    assert sum(left) == pytest.approx(0.6 * 6 * 768, abs=6 * 16)
    assert max(left) - min(left) > 64
    assert all(n % 32 == 0 for n in left)


# options, contracts and what is left alone


def test_a_second_run_finds_nothing_to_do():
    program, samples = captured("opt"), Samples(random_tokens(4, 24))
    Interpolate(heads=0.5).apply(program, samples)
    again = Interpolate(heads=0.5).apply(program, samples)
    assert again.done == ()
    assert set(again.skipped.values()) == {
        "has 96 of 128 neurons, and 96 are to be left",
        "has 2 of 4 heads, and 2 are to be left",
    }
    further = Interpolate(neurons=0.5).apply(program, samples)  # shares are of the unpruned model
    assert [note["left"] for note in further.notes["sites"].values()] == [64, 64]


def test_a_second_step_is_an_error(llama, tokens):
    steps = [Step(name, "prune.interpolate", catalogue()["prune.interpolate"](), {}) for name in ("once", "twice")]
    with pytest.raises(StepFailed) as caught:
        run(llama, steps, Samples(tokens(8, 24)))
    assert str(caught.value).startswith("step 2, twice: matched nothing: ")
    assert "has 64 of 96 neurons, and 72 are to be left" in str(caught.value)


def test_counts_are_multiples():
    program = captured("opt")
    outcome = Interpolate(neurons=0.1).apply(program, Samples(random_tokens(4, 24)))
    why = "has 128 of 128 neurons, and 115.2 are to be left, which no other multiple of 32 columns is nearer to"
    assert outcome.skipped == {f"model.decoder.layers.{i}.fc2": why for i in (0, 1)}
    notes = Interpolate(neurons=0.1, multiple=1).apply(program, Samples(random_tokens(4, 24))).notes
    assert [note["left"] for note in notes["sites"].values()] == [115, 115]


def test_layers_are_counted_by_kind():
    program = captured("opt")
    outcome = Interpolate(heads=0.5, layers=(1,)).apply(program, Samples(random_tokens(4, 24)))
    assert outcome.done == ("model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2")
    assert set(outcome.skipped.values()) == {"layers leaves it out"}
    with pytest.raises(SmeltError, match=r"^layers are counted from 0 to 1 here, but are \[0, 2\]$"):
        Interpolate(layers=(0, 2)).apply(program, Samples(random_tokens(4, 24)))


def test_types_of_weights_stay():
    program = captured("opt")
    program.weights = {name: w.encoded(type(w.encoding)("float16")) for name, w in program.weights.items()}
    pruned = program.fork()
    Interpolate(heads=0.5).apply(pruned, Samples(random_tokens(4, 24)))
    assert {str(weight.encoding) for weight in pruned.weights.values()} == {"dense(dtype=float16)"}
    rows = pruned.weights["model.decoder.layers.0.fc1.weight"].dense()
    old = program.weights["model.decoder.layers.0.fc1.weight"].dense()
    assert all(any(torch.equal(row, other) for other in old) for row in rows)  # picked, not rounded again
    assert pruned.touched == {name for name, w in program.weights.items() if pruned.weights[name] is not w}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neurons": 1}, "neurons is a share from 0 to below 1, but is 1"),
        ({"heads": -0.1}, "heads is a share from 0 to below 1, but is -0.1"),
        ({"neurons": 0}, "neurons and heads are both 0: nothing to remove"),
        ({"ridge": 0}, "ridge must be above 0, but is 0"),
        ({"multiple": 0}, "multiple is a count of columns, but is 0"),
        (
            {"budget": "global", "select": "magnitude"},
            "budget: global weighs layers by what select: id leaves unexplained; use it with that",
        ),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(SmeltError) as caught:
        Interpolate(**options)
    assert str(caught.value) == message


def test_without_text():
    with pytest.raises(SmeltError, match="give calibration texts"):
        Interpolate().apply(captured("opt"), None)


def test_encoded_weights_are_refused():
    program = captured("opt")
    name = "model.decoder.layers.1.fc2.weight"
    program.weights[name] = program.weights[name].encoded(Affine(4, 32))
    program.origin[name] = Record(2, "weights.quantize", {})
    assert list(Interpolate().requires(program)) == [
        f"weights of {name} must be Dense, but are affine(bits=4, group=32, axis=token, zero=False, scale=float16) "
        "since step 2, weights.quantize: put prune.interpolate in front"
    ]
    assert list(Interpolate(layers=(0,)).requires(program)) == []


def test_a_cache_is_refused(cached):
    cached.origin["cache"] = Record(1, "cache.insert", {})
    assert list(Interpolate().requires(cached)) == [
        "prune.interpolate must come before the cache is inserted: its sites fix the number of heads, "
        "since step 1, cache.insert"
    ]


def test_other_inputs_are_refused():
    sketch = Sketch()
    pixels = sketch.graph.placeholder("pixels")
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    out = sketch.call(LINEAR, sketch.call(torch.ops.aten.add.Tensor, x, pixels), sketch.weight("w", 8, 16), None)
    assert list(Interpolate().requires(sketch.program(y=out))) == [
        "the inputs of sketch must be tokens with positions or a mask, but are tokens, pixels"
    ]


def test_activations_that_are_not_finite_are_refused():
    program = captured("opt")
    value = program.weights["model.decoder.layers.0.fc1.bias"].dense().clone()
    value[0] = math.inf
    program.weights["model.decoder.layers.0.fc1.bias"] = Weight.of(value)
    with pytest.raises(SmeltError, match=r"the samples give activations that are not finite$"):
        Interpolate().apply(program, Samples(random_tokens(4, 24)))
