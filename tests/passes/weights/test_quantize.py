"""weights.quantize: groups as fine as a matrix needs, every weight accounted for, true bits, one matrix at a time."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch

from smelt.ir.encoding import Affine, Dense
from smelt.ir.errors import SmeltError
from smelt.ir.ops import EMBEDDING, HEAD, LINEAR
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import catalogue
from smelt.passes.manager import StepFailed, run
from smelt.passes.measure import compare, sqnr
from smelt.passes.weights.quantize import Quantize, granularity
from smelt.recipes import Step

from ..families import Sketch, answer, captured, random_tokens, source_tokens

VECTOR = "a vector or scalar, not a matrix"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian with a value of 25 sigma every 512 columns of every row."""
    matrix = gaussian(*shape, seed=seed)
    matrix[:, ::512] = 25.0
    return matrix


def products(*matrices: torch.Tensor) -> Program:
    """Each matrix [N, K] multiplies the one before's result; the first reads a table [8, K]."""
    sketch = Sketch(vocabulary=8)
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, matrices[0].shape[1]))
    for i, matrix in enumerate(matrices):
        x = sketch.call(LINEAR, x, sketch.weight(f"m{i}", value=matrix), None)
    return sketch.program(y=x)


def groups(program: Program) -> dict[str, int]:
    return {n: w.encoding.group for n, w in program.weights.items() if isinstance(w.encoding, Affine)}


def total_noise(program: Program, originals: Mapping[str, torch.Tensor]) -> float:
    """Relative squared error, each matrix alike."""
    return sum(10 ** (-sqnr(value, program.weights[name].dense()) / 10) for name, value in originals.items())


# the search


def test_gaussian_rows_keep_one_scale():
    assert granularity(gaussian(64, 1024), 32, 64, 0.85) == 0


def test_outliers_are_fenced_in():
    assert granularity(with_outliers(64, 1024), 32, 64, 0.85) == 64


def test_a_halving_is_taken_below_alpha_and_not_at_it():
    rows = torch.zeros(1, 128)
    rows[:, 0], rows[:, 127] = 1.0, -0.5  # R(128) = 1.5, R(64) = 0.75
    assert granularity(rows, 32, 64, 0.5) == 0
    assert granularity(rows, 32, 64, 0.5001) == 64


def test_the_smallest_group_is_the_last():
    assert granularity(with_outliers(64, 1024), 32, 256, 0.85) == 256


def test_a_step_over_illegal_halves_is_held_to_alpha_for_each():
    rows = torch.zeros(1, 704)  # 704 = 11 * 64: from 352 the next group of whole blocks is 64, and R(64) = R / 11
    rows[:, 0] = 1.0
    assert granularity(rows, 32, 64, 0.51) == 64  # R / 2 < 0.51 R, and 2 R / 11 < 0.51 ** 2.46
    assert granularity(rows, 32, 64, 0.49) == 0  # 1 / 11 > 0.49 ** 3.46


def test_outliers_that_half_a_row_does_not_part_are_found():
    rows = torch.zeros(1, 1024)
    rows[:, [0, 512]] = 1.0  # R = 1, 1, 1 / 2, 1 / 4, 1 / 8
    assert granularity(rows, 32, 64, 0.85) == 64
    rows[:, ::64] = 1.0
    assert granularity(rows, 32, 64, 0.99) == 0


def test_zeros_keep_one_scale():
    assert granularity(torch.zeros(4, 256), 32, 64, 0.85) == 0


def test_adaptive_groups_recover_the_gap_in_few_bits():
    matrices = {f"m{i}": gaussian(1024, 1024, seed=i) for i in range(4)} | {"m4": with_outliers(256, 1024)}
    noise, bits = {}, {}
    for name, options in {"row": {"group": 0}, "fine": {"group": 64}, "adaptive": {}, "blind": {"alpha": 0.1}}.items():
        program = products(*matrices.values())
        outcome = Quantize(head="keep", **options).apply(program, None)
        noise[name] = 10 * math.log10(total_noise(program, {"m4": matrices["m4"]}))
        bits[name] = outcome.notes["bits_per_weight"]
    gap = noise["row"] - noise["fine"]  # dB
    assert gap > 8
    assert noise["row"] - noise["adaptive"] >= 0.9 * gap
    assert noise["row"] - noise["blind"] < 0.1 * gap  # the criterion can fail
    assert bits["adaptive"] < 4.13 < bits["fine"]


def test_each_matrix_has_its_own_group():
    program = products(gaussian(512, 512), with_outliers(512, 1024)[:, :512])
    outcome = Quantize(head="keep").apply(program, None)
    assert groups(program) == {"m0": 0, "m1": 64}
    assert outcome.notes["groups"] == {"64": 1, "row": 1}


def test_a_fixed_group_overrides_the_search():
    program = products(gaussian(512, 512), with_outliers(512, 1024)[:, :512])
    Quantize(head="keep", group=128).apply(program, None)
    assert groups(program) == {"m0": 128, "m1": 128}


# what is encoded


@pytest.mark.parametrize("bits, low, high", [(4, 17.0, 21.0), (8, 40.0, 46.0)])
def test_noise_is_that_of_the_width(bits, low, high):
    program = products(gaussian(256, 512), gaussian(256, 256))
    outcome = Quantize(bits=bits, head="keep").apply(program, None)
    assert low < outcome.notes["sqnr_db"]["min"] <= outcome.notes["sqnr_db"]["median"] < high
    assert outcome.notes["worst"] in ("m0", "m1")


def test_bits_and_bytes_are_those_that_are_stored():
    program = captured("llama")
    before = program.nbytes
    outcome = Quantize(smallest=32).apply(program, None)
    done = [program.weights[name] for name in outcome.done]
    stored = 8 * sum(weight.nbytes for weight in done) / sum(math.prod(weight.shape) for weight in done)
    assert outcome.notes["bits_per_weight"] == pytest.approx(stored, abs=1e-4)
    moved = outcome.notes["bytes"]["before"] - outcome.notes["bytes"]["after"]
    assert before - program.nbytes == moved > 0


FAMILIES = {"llama": 16, "gpt2": 10, "phi3": 10, "opt": 14, "gemma2": 15, "mixtral": 14, "bert": 15}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    program = captured(family)
    before = answer(program, random_tokens(2, 9))
    outcome = Quantize(smallest=32).apply(program, None)
    verify(program)
    assert len(outcome.done) == FAMILIES[family]
    assert set(outcome.done) | outcome.skipped.keys() == program.weights.keys()
    assert {name for name, weight in program.weights.items() if isinstance(weight.encoding, Affine)} == set(
        outcome.done
    )
    assert program.touched == set(outcome.done)
    assert 0.005 < float((answer(program, random_tokens(2, 9)) - before).norm() / before.norm()) < 0.5


def test_every_expert_has_its_own_scales():
    program = captured("mixtral")
    Quantize(smallest=32).apply(program, None)
    down = program.weights["model.layers.0.mlp.experts.down_proj"]
    assert down.encoding == Affine(4, 0)
    assert down.parts["scale"].shape == (4, 64, 1)


TABLES = [
    (8, "tied", Affine(8, 0)),
    (8, "own", Affine(8, 0)),
    ("same", "tied", Affine(4, 0)),
    ("keep", "tied", Dense("float32")),
]


@pytest.mark.parametrize("head, table, encoding", TABLES)
def test_vocabulary_matrices(head, table, encoding):
    sketch = Sketch()
    rows = sketch.weight("table", 8, 64)
    x = sketch.call(EMBEDDING, sketch.tokens, rows)
    x = sketch.call(LINEAR, x, sketch.weight("middle", 64, 64), None)
    program = sketch.program(
        logits=sketch.call(HEAD, x, rows if table == "tied" else sketch.weight("head", 8, 64), None)
    )
    outcome = Quantize(head=head).apply(program, None)
    assert program.weights["table"].encoding == encoding
    assert program.weights["middle"].encoding == Affine(4, 0)
    if table == "own":
        assert program.weights["head"].encoding == encoding
    assert outcome.skipped == ({"table": "a vocabulary matrix, and head is keep"} if head == "keep" else {})


def test_the_reference_model_stays_close(reference_path):
    from smelt.ir.capture.hf import capture_hf

    program = capture_hf(reference_path)
    tokens = source_tokens(reference_path, "typing inspect", 4, 128)
    before, size = answer(program, tokens), program.nbytes
    Quantize().apply(program, None)
    found = compare(before, answer(program, tokens))
    assert 0.005 < found.kl < 0.05
    assert found.top1 > 0.87
    assert 0.29 < program.nbytes / size < 0.31


# what is left alone, and why


def test_reasons():
    sketch = Sketch()
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 80))
    x = sketch.call(LINEAR, x, sketch.weight("odd", 64, 80), sketch.weight("bias", 64))
    doubled = sketch.weight("doubled", 64, 64)
    x = sketch.call(torch.ops.aten.add.Tensor, sketch.call(LINEAR, x, doubled, None), sketch.weight("plane", 1, 1, 64))
    x = sketch.call(torch.ops.aten.matmul.default, x, doubled)
    x = sketch.call(LINEAR, x, sketch.weight("narrow", 32, 64), None)
    x = sketch.call(LINEAR, x, sketch.weight("short", 8, 32), None)
    outcome = Quantize().apply(sketch.program(y=x), None)
    assert outcome.done == ("table", "narrow")
    assert outcome.skipped == {
        "odd": Affine(4, 0).refuses((64, 80)),
        "bias": VECTOR,
        "doubled": "also read by matmul_default, which is neither a matrix product nor a lookup",
        "plane": "read by add_tensor, which is neither a matrix product nor a lookup",
        "short": "its rows of 32 are shorter than a group of 64",
    }


def test_a_group_that_does_not_divide_the_row_is_a_reason():
    outcome = Quantize(group=48).apply(products(gaussian(64, 64)), None)
    assert outcome.skipped["m0"] == Affine(4, 48).refuses((64, 64))


def test_routers_are_left_alone():
    outcome = Quantize(smallest=32).apply(captured("mixtral"), None)
    assert {name: why for name, why in outcome.skipped.items() if why != VECTOR} == {
        f"model.layers.{layer}.mlp.gate.weight": "routes tokens to experts, where rounding sends tokens elsewhere"
        for layer in (0, 1)
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0}, "alpha is a share above 0 and at most 1, but is 0"),
        ({"smallest": 0}, "smallest is a count of weights, but is 0"),
        ({"group": -1}, "group is a count of weights (0: the whole row), but is -1"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(SmeltError) as caught:
        Quantize(**options)
    assert str(caught.value) == message


def test_what_is_not_finite_is_refused_by_name():
    matrix = gaussian(64, 64)
    matrix[3, 5] = math.nan
    with pytest.raises(SmeltError, match=r"^m0: has NaN or infinite values, which no integer stands for$"):
        Quantize().apply(products(matrix), None)


def test_a_scale_that_overflows_is_refused_by_name():
    with pytest.raises(SmeltError, match=r"^m0: affine\(.*\): a scale overflows float16 .*; use scale: float32$"):
        Quantize().apply(products(gaussian(64, 64) * 1e6), None)
    assert Quantize(scale="float32").apply(products(gaussian(64, 64) * 1e6), None).done == ("table", "m0")


def test_a_second_run_is_refused():
    program = products(gaussian(64, 64))
    steps = [Step(name, "weights.quantize", catalogue()["weights.quantize"](), {}) for name in ("once", "twice")]
    with pytest.raises(StepFailed) as caught:
        run(program, steps)
    assert str(caught.value) == (
        "step 2, twice: weights of table must be Dense, but are affine(bits=8, group=0, axis=token, zero=False, "
        "scale=float16) since step 1, weights.quantize, and 1 more: encode them once"
    )


# memory


class Watched(Mapping[str, torch.Tensor]):
    """Parts that make their tensor anew at each access, and note whether another matrix is still in memory then."""

    alive: weakref.WeakSet[torch.Tensor]

    def __init__(self, matrix: torch.Tensor, alive: list[weakref.ref[torch.Tensor]], worst: list[int]) -> None:
        self.matrix, self.handed, self.worst = matrix, alive, worst

    def __getitem__(self, part: str) -> torch.Tensor:
        gc.collect()
        self.worst.append(sum(tensor() is not None for tensor in self.handed))
        made = self.matrix.clone()
        self.handed.append(weakref.ref(made))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(("data",))

    def __len__(self) -> int:
        return 1


def test_one_matrix_is_decoded_at_a_time():
    program = products(*(gaussian(64, 64, seed=i) for i in range(4)))
    handed: list[weakref.ref[torch.Tensor]] = []
    worst: list[int] = []
    for name, weight in list(program.weights.items()):
        watched = Watched(weight.parts["data"], handed, worst)
        program.weights[name] = Weight(weight.shape, weight.encoding, watched)
    Quantize().apply(program, None)
    assert len(worst) >= 5
    assert max(worst) <= 1
