"""Affine codes: what they cost, how far they are off, how they are packed and what they refuse."""

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

# signal to noise of a Gaussian tensor, in dB: a no-op would be infinite, a scale that is 5 % off 26 dB at most
BOUNDS = {
    Affine(8, 0): (39, 45),
    Affine(8, 64): (43, 48),
    Affine(6, 64): (31, 34),
    Affine(5, 64): (25, 27.5),
    Affine(4, 64): (18.5, 20.5),
    Affine(4, 32, zero=True): (21, 23.5),
    Affine(4, 64, "channel", zero=True): (20, 22),
    Affine(3, 64): (11.5, 13.5),
    Affine(3, 32, zero=True): (14.5, 16.5),
    Affine(3, 64, "channel", zero=True): (13, 15),
    Affine(2, 64, zero=True): (6, 8),
    Affine(2, 64): (1.5, 4),
    Affine(4, 64, scale="float32"): (18.5, 20.5),
    Affine(4, 64, scale="bfloat16"): (18.5, 20.5),
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


@pytest.mark.parametrize("encoding", BOUNDS, ids=str)
def test_the_error_lies_between_its_bounds(encoding: Affine) -> None:
    x = gaussian(128, 256)
    low, high = BOUNDS[encoding]
    assert low < decibels(x, encoding.decode(encoding.encode(x), (128, 256))) < high


def test_a_scale_five_percent_off_leaves_the_bounds() -> None:
    encoding, x = Affine(8, 64), gaussian(128, 256)
    parts = encoding.encode(x)
    parts["scale"] = parts["scale"] * 1.05
    assert decibels(x, encoding.decode(parts, (128, 256))) < BOUNDS[encoding][0]


@pytest.mark.parametrize("encoding", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (2, 3, 128, 192)])
def test_the_formula_counts_every_stored_bit(encoding: Affine, shape: tuple[int, ...]) -> None:
    parts = encoding.encode(gaussian(*shape))
    assert encoding.stored_bits(shape) == sum(8 * part.numel() * part.itemsize for part in parts.values())


def test_the_formula_takes_symbols() -> None:
    n, k = sympy.symbols("N K", positive=True, integer=True)
    assert Affine(4, 64, zero=True).stored_bits((n, k)) == 4 * n * k + n * k / 2
    assert Affine(8, 0).stored_bits((n, k)) == 8 * n * k + 16 * n


@pytest.mark.parametrize("encoding", BOUNDS, ids=str)
def test_every_element_is_off_by_half_a_step_at_most(encoding: Affine) -> None:
    x = gaussian(2, 128, 128)
    parts = encoding.encode(x)
    dim = -1 if encoding.axis == "token" else -2
    step = parts["scale"].float().repeat_interleave(x.shape[dim] // parts["scale"].shape[dim], dim)
    # rounding the scale (and zero) down may clip the extremes by as much as the storage dtype is coarse
    coarse = torch.finfo(parts["scale"].dtype).eps * x.abs().max() * 2
    assert ((x - encoding.decode(parts, tuple(x.shape))).abs() <= step / 2 + coarse).all()


@pytest.mark.parametrize("encoding", BOUNDS, ids=str)
def test_encoding_twice_changes_nothing(encoding: Affine) -> None:
    once = encoding.decode(encoding.encode(gaussian(64, 128)), (64, 128))
    again = encoding.decode(encoding.encode(once), (64, 128))
    torch.testing.assert_close(again, once, rtol=2e-2 if encoding.scale == "bfloat16" else 3e-3, atol=1e-2)


def test_codes_lie_as_documented() -> None:
    row = torch.arange(-7.0, 9.0).clamp(max=7).repeat(2).unsqueeze(0)  # 32 columns of exact 4-bit codes
    row[0, 16:] = row[0, 16:].flip(0)
    parts = Affine(4, 0).encode(row)
    assert parts["scale"].tolist() == [[1.0]]
    assert (parts["codes"][0] & 15).tolist() == (row[0, :16] + 8).int().tolist()  # column j in the low nibble
    assert (parts["codes"][0] >> 4).tolist() == (row[0, 16:] + 8).int().tolist()  # column j + 16 in the high one

    codes = torch.arange(64).remainder(4).float().unsqueeze(0)
    packed = Affine(2, 0, zero=True).encode(codes)["codes"][0]
    for field in range(4):
        assert ((packed >> (2 * field)) & 3).tolist() == codes[0, 16 * field : 16 * (field + 1)].int().tolist()
    codes = torch.arange(64).remainder(8).float().unsqueeze(0)
    codes[0, 17] = 7
    held = Affine(3, 0, zero=True).encode(codes)
    for field in range(4):
        assert ((held["codes"][0] >> (2 * field)) & 3).tolist() == (codes[0, 16 * field :][:16].int() & 3).tolist()
        bits = [int(held["high"][0, field]) >> i & 1 for i in range(16)]  # one int16 for sixteen neighbours
        assert bits == (codes[0, 16 * field :][:16].int() >> 2).tolist()
    assert held["codes"].dtype is torch.uint8 and held["high"].dtype is torch.int16
    assert Affine(8, 0).encode(torch.tensor([[127.0, -127.0, 0.0]]))["codes"].tolist() == [[255, 1, 128]]


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_constant_group_is_kept(axis: str) -> None:
    x = torch.full((64, 64), -0.75)
    for zero in (False, True):
        encoding = Affine(4, 32, axis, zero=zero, scale="float32")
        assert torch.equal(encoding.decode(encoding.encode(x), (64, 64)), x)
    encoding = Affine(2, 32, axis, zero=True)
    assert torch.equal(encoding.decode(encoding.encode(x), (64, 64)), x)


@pytest.mark.parametrize("zero", [False, True])
def test_zeros_stay_zeros(zero: bool) -> None:
    encoding = Affine(4, 32, zero=zero)
    assert torch.equal(encoding.decode(encoding.encode(torch.zeros(4, 64)), (4, 64)), torch.zeros(4, 64))


@pytest.mark.parametrize("magnitude", [1e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("zero", [False, True])
def test_subnormal_scales_clip_nothing(magnitude: float, zero: bool) -> None:
    encoding, x = Affine(4, 64, zero=zero), gaussian(16, 64) * magnitude
    smallest = 2.0**-24  # the step between subnormals of float16
    worst = (x - encoding.decode(encoding.encode(x), (16, 64))).abs().max()
    assert worst <= max(smallest, float(x.abs().max()) / 7)


def test_a_scale_that_overflows_is_refused_with_the_way_out() -> None:
    x = gaussian(4, 64) * 1e7
    with pytest.raises(SmeltError, match=r"overflows float16.*scale: float32"):
        Affine(4, 64).encode(x)
    wide = Affine(4, 64, scale="float32")
    assert decibels(x, wide.decode(wide.encode(x), (4, 64))) > 17


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = gaussian(4, 64)
    x[2, 5] = bad
    with pytest.raises(SmeltError, match="NaN or infinite"):
        Affine(4, 64).encode(x)


def test_no_tokens_are_no_error() -> None:
    for encoding in (Affine(4, 32), Affine(4, 32, "channel")):
        x = torch.zeros(2, 2, 0, 64)
        assert encoding.decode(encoding.encode(x), tuple(x.shape)).shape == x.shape


def test_tokens_encode_one_by_one_as_all_at_once() -> None:
    encoding, x = Affine(4, 32, zero=True), gaussian(2, 2, 7, 64)
    whole = encoding.encode(x)
    for t in range(7):
        one = encoding.encode(x[:, :, t : t + 1])
        assert all(torch.equal(one[part], whole[part][:, :, t : t + 1]) for part in whole)


def test_non_contiguous_input_encodes_alike() -> None:
    x = gaussian(128, 64)
    a, b = Affine(4, 32).encode(x.t()), Affine(4, 32).encode(x.t().contiguous())
    assert all(torch.equal(a[part], b[part]) for part in a)


@pytest.mark.parametrize(
    ("encoding", "shape", "reason"),
    [
        (Affine(4, 0), (4, 48), "multiple of 32"),
        (Affine(2, 0), (4, 96), "multiple of 64"),
        (Affine(3, 0), (4, 96), "multiple of 64"),
        (Affine(4, 64), (4, 96), "not a multiple of group=64"),
        (Affine(4, 64, "channel"), (63, 64), "dim -2 is 63"),
        (Affine(8, 0), (4,), "needs a tensor"),
        (Affine(8, 0), (4, 0), "last dim, 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(encoding: Affine, shape: tuple[int, ...], reason: str) -> None:
    assert reason in (encoding.refuses(shape) or "")
    with pytest.raises(SmeltError, match=rf"affine\(bits=.*{reason}"):
        encoding.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7, "group": 64}, "one of 2, 3, 4, 5, 6, 8"),
        ({"bits": "4", "group": 64}, "one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group": -1}, "group must be"),
        ({"bits": 4, "group": 64, "axis": "chanel"}, "did you mean 'channel'"),
        ({"bits": 4, "group": 0, "axis": "channel"}, "needs a group of tokens"),
        ({"bits": 4, "group": 64, "zero": 1}, "zero must be"),
        ({"bits": 4, "group": 64, "scale": "float8"}, "scale must be"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, object], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        Affine(**options)  # type: ignore[arg-type]


def test_an_encoding_is_a_value() -> None:
    assert Affine(4, 64) == Affine(bits=4, group=64) != Affine(4, 32)
    assert len({Affine(4, 64), Affine(4, 64)}) == 1
    with pytest.raises(AttributeError):
        Affine(4, 64).group = 3  # type: ignore[misc]


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([0, 16, 64]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_decoding_is_finite_and_within_the_range(bits: int, group: int, zero: bool, n: int, blocks: int) -> None:
    encoding, x = Affine(bits, group, zero=zero), gaussian(n, 64 * blocks, seed=n)
    y = encoding.decode(encoding.encode(x), tuple(x.shape))
    assert y.isfinite().all() and y.abs().max() <= x.abs().max() * 1.01
