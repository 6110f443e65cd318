"""The C++ kernel of attention mass: against the reference, the same bits on any threads, and mutants that show."""

from functools import cache

import pytest
import torch

from smelt.codegen import mass
from smelt.codegen.lower import lower
from smelt.codegen.mass import column_sums
from smelt.ir.cache import Score, Select, score
from smelt.ir.cache.segments import Segments
from smelt.ir.capture.hf import capture_hf
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.runtime.session import Session

from ..families import zoo
from ..ir.programs import cached
from .mutants import mutant

TOLERANCE = 5e-6  # relative to the largest; logits of 15 are rounded at 1e-6, and weights by as much
SHAPES = {  # heads, KV heads, dim, type
    "even": (4, 2, 64, torch.float32),
    "odd": (3, 1, 20, torch.float16),
    "wide": (8, 8, 128, torch.bfloat16),
}
SIZES = [(1, 1), (1, 63), (7, 256), (65, 700)]  # queries, keys
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def given(shape, queries, keys, seed=0):
    """q with strides, keys, and positions: keys with gaps, the newest queries last."""
    heads, groups, dim, dtype = shape
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, dim + 4, generator=random)[..., :dim].transpose(0, 1)
    k = torch.randn(groups, keys, dim, generator=random).to(dtype)
    at = torch.stack([torch.randperm(keys + 5, generator=random)[:keys].sort().values for _ in range(groups)])
    return q, k, torch.arange(keys + 5 - queries, keys + 5), at


def options(heads):
    yield {}
    yield {"window": 40}
    yield {"softcap": 2.0, "sinks": torch.linspace(-2, 3, heads)}


def column_mass(*given, **more):
    """The kernel's."""
    return score.column_mass(*given, **more, sums=column_sums)


def error(got, want):
    return float(((got - want).abs().nan_to_num(nan=9.0) / want.abs().amax().clamp(min=1e-3)).max())


@every_shape
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_the_kernel_sums_columns_as_the_reference(shape, queries, keys):
    q, k, q_at, k_at = given(shape, queries, keys)
    for more in options(shape[0]):
        for normalize, reduce in (("none", "mean"), ("length", "max"), ("count", "sum")):
            got = column_mass(q, k, q_at, k_at, 0.3, **more, normalize=normalize, reduce=reduce)
            want = score.column_mass(q, k, q_at, k_at, 0.3, **more, normalize=normalize, reduce=reduce)
            assert got.shape == want.shape and error(got, want) < TOLERANCE, (more, normalize)


def test_blocks_of_queries_share_the_scratch(monkeypatch):
    q, k, q_at, k_at = given(SHAPES["even"], 65, 700)
    whole = column_mass(q, k, q_at, k_at, 0.3)
    monkeypatch.setattr(mass, "SCRATCH", 1 << 14)
    assert mass.scratch(4, 2, 64, 700, 65)[1] == 5
    assert torch.equal(column_mass(q, k, q_at, k_at, 0.3), whole)


def test_the_bits_do_not_depend_on_threads(monkeypatch):
    q, k, q_at, k_at = given(SHAPES["even"], 65, 700)
    together = column_mass(q, k, q_at, k_at, 0.3)
    monkeypatch.setenv("SMELT_THREADS", "1")
    assert torch.equal(column_mass(q, k, q_at, k_at, 0.3), together)


def test_any_strides_and_halves_will_do():
    q, k, q_at, k_at = given(SHAPES["odd"], 7, 63)
    whole = column_mass(q, k, q_at, k_at, 0.3)
    turned = k.mT.contiguous().mT
    wide = k_at.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(column_mass(q.mT.contiguous().mT, turned, q_at.repeat_interleave(2)[::2], wide, 0.3), whole)
    assert torch.equal(column_mass(q.half(), k, q_at, k_at, 0.3), column_mass(q.half().float(), k, q_at, k_at, 0.3))


@pytest.mark.parametrize("options", [{}, {"queries": 5, "normalize": "length", "pool": 3}, {"combine": "aligned"}])
def test_scores_take_the_kernel(options):
    q, k, q_at, k_at = given(SHAPES["even"], 40, 63)
    given_all = (score.Score(**options), k, k, k_at, q, q_at)
    got = score.scores(*given_all, scale=0.3, sums=column_sums)
    assert error(got, score.scores(*given_all, scale=0.3)) < TOLERANCE


def test_queries_that_see_nothing_give_nothing_and_nan_shows():
    q, k, q_at, k_at = given(SHAPES["even"], 3, 40)
    assert (column_mass(q, k, q_at - 100, k_at, 0.3) == 0).all()
    assert column_mass(q[:, :0], k, q_at[:0], k_at, 0.3).shape == (2, 40)
    q[1, 2, 3] = float("nan")
    found = column_mass(q, k, q_at, k_at, 0.3)
    assert found[0].isnan().any() and found[1].isfinite().all()


MUTANTS = {
    "5 % scale": ("x[d] * at.scale : 0", "x[d] * at.scale * 1.05f : 0"),
    "a dropped key": ("live[j] = -1, seen++", "live[j] = j ? -1 : 0, seen++"),
    "a dropped query": ("first + t ? read", "first + t > 1 ? read"),
    "wrong head": ("at.logits(h, t) + s)", "at.logits(h ^ 1, t) + s)"),
    "a chunk without its factor": (" * exponential(splat(mosts[c] - most))[0]", ""),
    "window too wide": ("distance >= window", "distance > window"),
    "no sinks": ("if (at.sinks) total +=", "if (0) total +="),
    "a chunk not counted": ("many += seen[c]", "many += c ? 0 : seen[c]"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(right, wrong):
    q, k, q_at, k_at = given(SHAPES["even"], 7, 700)
    more = {"window": 600, "sinks": torch.linspace(-2, 3, 4), "normalize": "length"}
    want = score.column_mass(q, k, q_at, k_at, 0.3, **more)
    assert error(column_mass(q, k, q_at, k_at, 0.3, **more), want) < TOLERANCE
    with mutant(right, wrong):
        assert error(column_mass(q, k, q_at, k_at, 0.3, **more), want) > 100 * TOLERANCE


@cache
def with_sinks() -> Program:
    """A decoder that learned its sinks, over a cache whose layers choose by attention."""
    model = zoo.random_model(zoo.config("granite_swa"))
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data = torch.linspace(-2, 4, len(parameter))
    program = capture_hf(model)
    derive(program)
    return cached(program, sink=2, tail=4, page=8, select=Select(Score("attention"), 0.4, when="prompt"))


def kept(target) -> list[list[int]]:
    """Positions of the tokens that survive of a prompt, by layer and KV head."""
    session = Session(lower(with_sinks(), target), 1, 64)
    session.prefill([[(7 * i) % zoo.VOCABULARY for i in range(20)]])
    bodies = [segments.bodies[0].decoded(0) for segments in session.cache.segments.values()]
    return [row[real.isfinite()].tolist() for b in bodies for row, real in zip(b.positions, b.bias, strict=True)]


def test_a_models_sinks_reach_the_scores(monkeypatch):
    wanted = kept("torch")
    assert kept("cpp") == wanted
    monkeypatch.setattr(Segments, "sink_logits", property(lambda self: None, lambda self, value: None), False)
    assert kept("torch") != wanted


def test_what_it_cannot_read_is_named():
    q, k, q_at, k_at = given(SHAPES["even"], 3, 40)
    with pytest.raises(SmeltError, match="not int8; decode them"):
        column_mass(q, k.to(torch.int8), q_at, k_at, 0.3)
    with pytest.raises(ValueError, match=r"where G divides H, .*, not \[3, 3, 64\], \[2, 40, 64\]"):
        column_mass(q[:3], k, q_at, k_at, 0.3)
