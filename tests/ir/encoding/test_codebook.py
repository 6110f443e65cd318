"""Codebooks: what k-means finds, what weights change, the grid of a Gaussian, and how codes of ten bits are packed."""

import pytest
import torch

from smelt.ir.encoding import Codebook, Nonuniform, clusters, packing

from .examples import decibels


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(encoding: Codebook, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    return encoding.decode(encoding.alone(x, weight), tuple(x.shape))


def test_separate_clusters_are_found() -> None:
    centres = gaussian(16, 4) * 10
    x = centres[torch.arange(640) % 16] + 0.01 * gaussian(640, 4, seed=1)
    found = clusters.fitted(x, None, 16)
    assert (torch.cdist(centres, found).amin(1) < 0.02).all()


def test_a_centre_without_samples_is_moved() -> None:
    x = torch.cat([torch.zeros(100, 2), torch.ones(1, 2)])
    codes, error = clusters.assigned(x, clusters.fitted(x, None, 4))
    assert error.max() == 0 and codes[0] != codes[-1]


@pytest.mark.parametrize(("dims", "bits", "error"), [(1, 3, 0.03454), (2, 4, 0.107), (2, 8, 0.0074)])
def test_the_grid_of_a_gaussian_is_near_the_best_known(dims: int, bits: int, error: float) -> None:
    """Errors per number; the best of 16 points in the plane is 0.1066, of 256 about 0.0073."""
    grid, x = clusters.gaussian(dims, 2**bits), gaussian(1 << 16, dims)
    _, found = clusters.assigned(x, grid)
    assert 0.97 * error < float(found.mean()) / dims < 1.08 * error
    assert torch.equal(grid, clusters.gaussian.__wrapped__(dims, 2**bits))


def test_coupled_channels_gain_at_equal_bits() -> None:
    """The paper's order: at one and the same rate the error falls as more channels are coupled."""
    base = gaussian(4096, 16)
    x = torch.stack([base, 0.8 * base + 0.6 * gaussian(4096, 16, seed=1)], -1).flatten(1)  # neighbours depend
    one, two, four = (decibels(x, through(Codebook(dims, 2 * dims), x)) for dims in (1, 2, 4))
    assert one + 0.5 < two and two + 0.3 < four


def test_weights_count() -> None:
    x = gaussian(2048, 16)
    weight = torch.where(x.abs() > 1.5, 1.0, 1e-3)
    plain, weighted = (through(Codebook(4, 6, shared=True), x, w) for w in (None, weight))
    counts = [float((weight * (x - y).square()).sum()) for y in (plain, weighted)]
    assert counts[1] < 0.9 * counts[0]


def test_each_group_of_channels_has_a_book_unless_they_share() -> None:
    x = gaussian(512, 32) * torch.logspace(-2, 2, 32)
    own, shared = Codebook(2, 4), Codebook(2, 4, shared=True)
    assert own.fit(x)["book"].shape == (16, 16, 2) and shared.fit(x)["book"].shape == (1, 16, 2)
    assert own.table_bits((512, 32)) == 16 * shared.table_bits((512, 32)) == 16 * 16 * 16 * 2
    small = x[:, :2]
    assert decibels(small, through(own, x)[:, :2]) > decibels(small, through(shared, x)[:, :2]) + 6


def test_a_norm_makes_a_grid_fit_any_scale() -> None:
    x = gaussian(256, 64) * torch.logspace(-3, 3, 256)[:, None]
    assert decibels(x[:1], through(Codebook(2, 8, "gaussian", norm=True), x)[:1]) > 19
    assert decibels(x[:1], through(Codebook(2, 8, "gaussian"), x)[:1]) < 3


def test_one_dim_of_a_grid_is_the_table_of_a_gaussian() -> None:
    x = gaussian(64, 64)
    grid = through(Codebook(1, 4, "gaussian", norm=True), x)
    table = Nonuniform(4, kind="normal", zero=False)
    assert torch.allclose(grid, table.decode(table.alone(x), (64, 64)), atol=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8, 9, 10])
@pytest.mark.parametrize("lanes", [1, 16])
def test_codes_are_packed_without_a_gap(bits: int, lanes: int) -> None:
    columns = 128
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    parts = packing.pack(codes, bits, lanes)
    assert sum(8 * part.numel() * part.itemsize for part in parts.values()) == bits * codes.numel()
    assert torch.equal(packing.unpack(parts, bits, columns, lanes).int(), codes)
    assert columns % packing.block(bits, lanes) == 0


def test_head_dims_that_do_not_fit_are_named() -> None:
    assert Codebook(8, 8).refuses((2, 4, 100)) == "vectors of dims=8 channels do not divide a row of 100"
    assert "4 codes, not a multiple of 8" in (Codebook(4, 9).refuses((4, 16)) or "")
