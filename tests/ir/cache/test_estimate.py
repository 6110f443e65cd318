"""SubGen's estimator: both sums are right on average, exact where everything is held, and alike however tokens come."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Cache, CachePlan, Estimate, Merge, Retrieve, Score, Select, Site
from smelt.ir.cache.estimate import Entries, assigned, clustered, drawn
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

N, D, E = 96, 8, 6
HOW = Estimate(values=24, clusters=8, samples=2, radius=0.6, mix=1 / 4)
SITE = Site(layer=0, heads=4, kv_heads=2, key_dim=D, value_dim=E, sink=2, tail=8, page=8, estimate=HOW)
NONE = torch.zeros(0)
EMPTY = Entries(NONE.view(0, D), NONE.view(0, E), NONE.long(), NONE, NONE, NONE.long())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# keys in twelve clusters of different sizes, values of different lengths
K = random(12, D)[random(N, seed=1).abs().mul(4).long().clamp(max=11)] + 0.1 * random(N, D, seed=2)
V, Q, AT = random(N, E, seed=3) * random(N, 1, seed=4).exp(), 0.5 * random(D, seed=5), torch.arange(N)


def entries(how: Estimate, key: int, step: int = N) -> tuple[Entries, Entries]:
    """Entries for z and τ after all tokens came, `step` at a time."""
    z, tau = EMPTY, EMPTY
    for some in AT.split(step):
        z = drawn(how, z, K[some], V[some], AT[some], key)
        tau = clustered(how, tau, K[some], V[some], AT[some], 8, key + 1)
    return z, tau


def sums(held: tuple[Entries, ...], biased: bool = True) -> torch.Tensor:
    """z and τ as attention reads them, [E + 1]."""
    keys, values, bias = (torch.cat([getattr(part, name) for part in held]) for name in ("keys", "values", "bias"))
    p = (keys @ Q + (bias if biased else 0)).exp()
    return torch.cat([p @ values, p.sum()[None]])


@pytest.mark.parametrize("mix", [1 / 64, 1 / 2])
def test_both_sums_are_right_on_average(mix):
    p = (K @ Q).exp()
    exact, how = torch.cat([p @ V, p.sum()[None]]), replace(HOW, mix=mix)
    made = [entries(how, 2 * seed) for seed in range(400)]
    tried = torch.stack([sums(held) for held in made])
    error, spread = tried.mean(0) - exact, tried.std(0) / len(tried) ** 0.5
    assert (error.abs() < 4 * spread).all() and (tried.std(0) > 0).all()
    assert error[-1].abs() < 0.05 * exact[-1] and error[:-1].norm() < 0.1 * exact[:-1].norm()
    # mutants: tokens of clusters stand for none but themselves; those for z do; tokens for z do not join in τ
    of_tau = [(z, tau._replace(bias=torch.full_like(tau.bias, 1 - mix).log())) for z, tau in made]
    of_z = [(z._replace(bias=torch.full_like(z.bias, mix).log()), tau) for z, tau in made]
    for wrong, at in ((of_tau, slice(-1, None)), (of_z, slice(-1)), ([held[1:] for held in made], slice(-1, None))):
        off = torch.stack([sums(held) for held in wrong]).mean(0) - exact
        assert (off[at].abs() > 4 * spread[at]).any()


def test_more_samples_come_closer():
    p = (K @ Q).exp()
    exact, errors = p @ V / p.sum(), []
    for many in (12, 48, N):
        how = Estimate(values=many, clusters=many // 3, samples=2, radius=0.6)
        tried = [sums(entries(how, 2 * seed)) for seed in range(30)]
        errors.append(float(torch.stack([(x[:-1] / x[-1] - exact).norm() for x in tried]).mean()))
    assert errors[0] > 1.5 * errors[1] and errors[2] < 0.2 * errors[1]


def test_the_draw_goes_by_positions_alone():
    whole, pieces = entries(HOW, 6), entries(HOW, 6, 8)
    for a, b in zip([*whole[0], *whole[1]], [*pieces[0], *pieces[1]], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole[0].positions, entries(HOW, 8)[0].positions)
    for held, most in zip(whole, HOW.most, strict=True):
        assert len(held.positions) <= most and (held.positions.diff() > 0).all()


def test_clusters_are_those_of_a_loop():
    """One key after the other joins the nearest first key, or opens a cluster."""
    for how in (HOW, replace(HOW, clusters=3), replace(HOW, radius=0.0)):
        centers: list[int] = []
        for i in range(N):
            far = [float((K[i] - K[c]).norm()) for c in centers]
            near = min(range(len(far)), key=far.__getitem__, default=None)
            alone = near is None or far[near] > how.radius * float(K[centers[near]].norm())
            if alone and len(centers) < how.clusters:
                centers.append(i)
                near = len(centers) - 1
            assert int(assigned(how, K[:0], AT[:0], K[: i + 1], AT[: i + 1])[i]) == centers[near]
        held = entries(how, 0)[1]
        assert sorted(set(held.owner.tolist())) == centers
        assert float(held.mass[held.owner == held.positions].sum()) == N


def test_attention_is_exact_while_everything_is_held_and_bytes_are_bounded():
    q, k, v = random(1, 4, 200, D, seed=7), random(1, 2, 200, D, seed=8), random(1, 2, 200, E, seed=9)
    errors = []
    for how in (Estimate(values=200, clusters=200, radius=0.0, mix=1 / 4), HOW):
        site = replace(SITE, estimate=how)
        cache = Cache(CachePlan((site,)), 1, 256)
        for first, last in ((0, 150), *((i, i + 1) for i in range(150, 200))):
            cache.begin(torch.arange(first, last)[None])
            cache.append(0, k[:, :, first:last], v[:, :, first:last])
            got = cache.attend(0, q[:, :, first:last], site.attention_scale)
            cache.commit([list(range(last - first))])
            if first == 0:
                cache.end_prefill()
        p = torch.softmax(q[0, :, -1].view(2, 2, D) @ k[0].mT * site.attention_scale, -1)
        errors.append(float((got[0, :, 0] - (p @ v[0]).flatten(0, 1)).abs().max()))
        bound = int(site.bits(200, 150)) // 8
        assert cache.nbytes().used <= bound + 2 * 2 * int(site.page_bits(1)) // 8
        assert int(site.bits(2000, 150)) == int(site.bits(4000, 150)) or how != HOW
    assert errors[0] < 1e-5 and errors[1] > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 50}, "its window forgets tokens"),
        ({"select": Select(Score("value_norm"), 0.5)}, "cache.select acts on tokens that stand for themselves"),
        ({"values": Affine(8, 0, zero=True)}, "cache.encode acts on"),
        ({"retrieve": Retrieve("pages", 16)}, "cache.retrieve acts on"),
        ({"merge": Merge()}, "set select with when: prompt"),
        ({"tail": None, "sink": 0}, "set `tail`"),
    ],
)
def test_what_does_not_go_together(change, message):
    with pytest.raises(SmeltError, match=message):
        replace(SITE, **change)


@pytest.mark.parametrize(
    "option", [{"values": 0}, {"clusters": 0}, {"samples": -1}, {"radius": -0.1}, {"mix": 0.3}, {"mix": 1.0}]
)
def test_bad_options_are_named(option):
    with pytest.raises(SmeltError, match=f"estimate: {next(iter(option))}"):
        Estimate(**option)


def test_a_site_is_written_and_read():
    assert Site.from_dict(SITE.to_dict()) == SITE and "estimate" not in replace(SITE, estimate=None).to_dict()
