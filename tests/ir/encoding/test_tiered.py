"""Coded bfloat16 matrices: every bit comes back, every bit is counted, and what would be rounded is refused."""

import pytest
import torch

from smelt.ir.encoding import Tiered, parse
from smelt.ir.errors import SmeltError

EVERY = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)  # subnormals, both zeros and all NaN among them


def gaussian(*shape: int) -> torch.Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16()


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize("x", [EVERY.view(512, 128), EVERY.view(-1, 4)[:-5], EVERY.view(1, -1), gaussian(33, 192)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_comes_back_to_the_bit(x: torch.Tensor, dtype: torch.dtype) -> None:
    encoding, parts = Tiered.coded(x.to(dtype))
    shape = tuple(x.shape)
    assert same(x, encoding.decode(parts, shape, torch.bfloat16))
    assert torch.equal(encoding.decode(parts, shape).view(torch.int32), x.float().view(torch.int32))
    assert encoding.stored_bits(shape) == sum(8 * part.numel() * part.itemsize for part in parts.values())


@pytest.mark.parametrize("part", ["low", "first", "second", "rest", "table"])
def test_every_part_counts(part: str) -> None:
    x = gaussian(64, 64)
    encoding, parts = Tiered.coded(x)
    parts[part] = parts[part].clone()
    parts[part].view(-1)[0] ^= 1
    assert not same(x, encoding.decode(parts, (64, 64), torch.bfloat16))


def test_gaussian_weights_take_less_than_seventy_percent() -> None:
    encoding, _ = Tiered.coded(gaussian(512, 512))
    assert 0.66 < float(encoding.stored_bits((512, 512))) / 16 / 512**2 < 0.69


def test_counts_are_kept_and_do_not_part_two_matrices() -> None:
    encoding, parts = Tiered.coded(gaussian(64, 64))
    read = parse(encoding.spec())
    assert isinstance(read, Tiered) and read.counts == encoding.counts != (0, 0)
    assert encoding == encoding.form == Tiered() and encoding.form.counts == (0, 0)
    assert all(torch.equal(part, parts[name]) for name, part in encoding.encode(gaussian(64, 64)).items())
    with pytest.raises(SmeltError, match=r"the matrix has tiered\(counts="):
        Tiered().encode(gaussian(64, 64))


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(SmeltError, match="float16 with numbers that bfloat16 would round"):
        Tiered.coded(torch.full((4, 4), 0.1, dtype=torch.float16))
    for shape, reason in (((2, 4, 4), "needs a matrix"), ((4, 6), "no multiple of 4"), ((0, 4), "no multiple of 4")):
        with pytest.raises(SmeltError, match=reason):
            Tiered.coded(torch.zeros(shape))
    with pytest.raises(SmeltError, match="counts are two numbers"):
        Tiered((1, 2, 3))
    with pytest.raises(SmeltError, match="only in the order"):
        Tiered().expr((4, 4))
