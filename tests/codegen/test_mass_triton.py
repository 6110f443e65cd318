"""The Triton kernels of attention mass: against the reference in Triton's interpreter, and compiled for two GPUs."""

import pytest
import torch

from smelt.codegen import attention_triton, mass_triton
from smelt.codegen.autotune_triton import Tile
from smelt.codegen.mass_triton import OPTIONS, column_sums, covers, shape, signatures, splits
from smelt.codegen.triton_module import load
from smelt.ir.cache import score
from smelt.ir.errors import SmeltError

from .test_mass import SHAPES, error, given, kept, options
from .triton_checks import INTERPRETED, compiled, in_the_interpreter, interpreted, usage

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # halves: the query takes the keys' type
CASES = [("even", 7, 70), ("odd", 1, 63), ("odd", 18, 70), ("many", 3, 40)]  # the interpreter's bfloat16 is wrong
SHAPES = SHAPES | {"many": (24, 1, 128, torch.float16)}


def column_mass(*given, **more):
    """The kernels'."""
    return score.column_mass(*given, **more, sums=column_sums)


@interpreted
@pytest.mark.parametrize(("name", "queries", "keys"), CASES)
def test_the_kernels_sum_columns_as_the_reference(name, queries, keys):
    q, k, q_at, k_at = given(SHAPES[name], queries, keys)
    kinds = (("count", "sum"), ("length", "max"), ("none", "mean"))
    for more, (normalize, reduce) in zip(options(q.shape[0]), kinds, strict=True):
        got = column_mass(q, k, q_at, k_at, 0.2, **more, normalize=normalize, reduce=reduce)
        want = score.column_mass(q, k, q_at, k_at, 0.2, **more, normalize=normalize, reduce=reduce)
        assert error(got, want) < TOLERANCE[k.dtype], more


@interpreted
def test_a_models_sinks_reach_the_scores(monkeypatch):
    monkeypatch.setattr(attention_triton, "INTERPRETED", 2)  # programs of the prompt's attention
    assert kept("triton") == kept("torch")


@interpreted
def test_queries_that_see_nothing_give_nothing():
    q, k, q_at, k_at = given(SHAPES["even"], 3, 40)
    assert (column_mass(q, k, q_at - 100, k_at, 0.2) == 0).all()
    assert column_mass(q[:, :0], k, q_at[:0], k_at, 0.2).shape == (2, 40)


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("x = x * scale", "x = x * scale * 1.05"),
        ("live = distance >= 0", "live = distance > 0"),
        ("distance < window", "distance <= window"),
        ("total * tl.exp(most - safe)", "total"),
        ("tl.load(of + 1) * tl.exp(mosts - safe[None, :])", "tl.load(of + 1)"),
        ("total += tl.exp(sink - safe)", "total += 0"),
        ("range(split * span, ", "range(split * span + BS * split, "),
        ("acc += tl.sum(p, 0)", "acc = tl.sum(p, 0)"),
    ],
)
def test_the_comparison_catches_a_wrong_kernel(right, wrong, monkeypatch):
    q, k, q_at, k_at = given(SHAPES["even"], 17, 150)
    more = {"window": 130, "sinks": torch.linspace(-2, 3, 4), "normalize": "length"}
    assert right in mass_triton.KERNELS
    monkeypatch.setattr(mass_triton, "PROGRAMS", 8)
    assert splits(17, shape(4, 2, 64, torch.float32), 150) == (2, 128)
    wrong_module = load(mass_triton.KERNELS.replace(right, wrong), "mass")
    want = score.column_mass(q, k, q_at, k_at, 0.2, **more)
    if wrong == "total":
        assert error(column_mass(q, k, q_at, k_at, 0.2, **more), want) < TOLERANCE[torch.float32]
    monkeypatch.setattr(mass_triton, "module", lambda: wrong_module)
    assert error(column_mass(q, k, q_at, k_at, 0.2, **more), want) > 100 * TOLERANCE[torch.float32]


@pytest.mark.skipif(INTERPRETED, reason="is the parent process")
def test_everything_holds_in_the_interpreter():
    in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize(
    ("dtype", "dim", "queries", "capability"),
    [
        (torch.float16, 128, 1, 80),
        (torch.float16, 128, 64, 90),
        (torch.bfloat16, 256, 64, 80),
        (torch.float32, 64, 64, 80),
    ],
)
def test_the_kernels_compile_for_a_gpu_without_spilling(dtype, dim, queries, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    sizes = shape(32, 8, dim, dtype)
    tile = Tile(warps=OPTIONS["num_warps"], stages=OPTIONS["num_stages"])
    flags = {"SOFTCAP": True, "WINDOW": True}
    more = {"SINKS": True, "LENGTH": True, "SPLITS": splits(queries, sizes, 32768)[0]}
    for name, types in signatures(dtype).items():
        constants = sizes | flags | (more if name == "columns" else {})
        whole = types | dict.fromkeys(constants, "constexpr")
        used = usage(getattr(mass_triton.module(), name), whole, constants, tile, capability, tmp_path)
        assert used.spilled == 0 and used.shared <= 99 * 1024, (name, used)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 5000), (65, 700)])
def test_the_kernels_compute_the_reference_on_a_gpu(name, queries, keys):
    q, k, q_at, k_at = (each.cuda() for each in given(SHAPES[name], queries, keys))
    got, want = (form(q, k, q_at, k_at, 0.2, 600) for form in (column_mass, score.column_mass))
    assert error(got, want) < 2 * TOLERANCE[k.dtype]


def test_it_says_what_it_does_not_cover():
    assert covers(torch.float16, 128) is None
    q, k, q_at, k_at = given(SHAPES["even"], 3, 40)
    with pytest.raises(SmeltError, match=r"not torch\.int8; decode them"):
        column_mass(q, k.to(torch.int8), q_at, k_at, 0.2)
