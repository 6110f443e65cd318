"""Sparse matrices by a bit an element: every value comes back, every bit is counted, every part counts."""

import pytest
import torch

from smelt.ir.encoding import NM, Affine, Bitmap, Dense, parse
from smelt.ir.errors import SmeltError


def sparse(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Half of it zeros, a row and a column of nothing else."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    x[x.abs() < 0.6745] = 0
    x[3 % rows], x[:, 1] = 0, 0
    return x


@pytest.mark.parametrize("shape", [(1, 4), (16, 8), (33, 192), (128, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_value_comes_back(shape: tuple[int, int], dtype: str) -> None:
    x = sparse(*shape, getattr(torch, dtype))
    encoding, parts = Bitmap(dtype).coded(x)
    assert torch.equal(encoding.decode(parts, shape), x)
    assert encoding.count == int((x != 0).sum())
    assert encoding.stored_bits(shape) == sum(8 * part.numel() * part.itemsize for part in parts.values())
    assert parse(str(encoding)) == encoding and parse(str(encoding)).stored_bits(shape) == encoding.stored_bits(shape)


@pytest.mark.parametrize("part", ["mask", "value"])
def test_every_part_counts(part: str) -> None:
    x = sparse(32, 64)
    encoding, parts = Bitmap().coded(x)
    held = parts[part].clone().view(torch.int16)
    held[:2] = held[:2].flip(0)
    assert not torch.equal(encoding.decode({**parts, part: held.view(parts[part].dtype)}, (32, 64)), x)


def test_half_of_the_weights_take_as_few_bits_as_they_should() -> None:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    half = x * (x.abs() > x.abs().median())
    assert 9 <= Bitmap().coded(half)[0].stored_bits((256, 512)) / half.numel() < 9.02
    assert NM(2, 4).stored_bits((256, 512)) / half.numel() == 9
    assert NM(2, 4, Affine(4, 64)).stored_bits((256, 512)) * 8 == 25 * half.numel()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SmeltError, match="has 1 values"):
        Bitmap().encode(torch.eye(1, 4))
    with pytest.raises(SmeltError, match="NaN or infinite"):
        Bitmap().coded(torch.full((1, 4), torch.nan))
    with pytest.raises(SmeltError, match="overflows float16"):
        Bitmap().coded(torch.full((1, 4), 1e6))
    assert "no multiple of 4" in (Bitmap().refuses((16, 6)) or "")
    assert "must be a multiple of 32" in (NM(2, 4, Dense("bfloat16")).refuses((16, 48)) or "")
