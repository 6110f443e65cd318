"""The plain encoding: any rank, any dtype, nothing lost but precision."""

import pytest
import torch

from smelt.ir.encoding import Dense
from smelt.ir.errors import SmeltError


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_decode_to_the_dtype_asked_for(shape: tuple[int, ...], dtype: str) -> None:
    x = torch.randn(shape)
    encoding = Dense(dtype)
    parts = encoding.encode(x)
    assert parts["data"].dtype == encoding.torch_dtype
    assert torch.equal(encoding.decode(parts, shape), x.to(encoding.torch_dtype).float())
    assert encoding.decode(parts, shape, torch.bfloat16).dtype == torch.bfloat16
    assert encoding.stored_bits(shape) == 8 * parts["data"].numel() * parts["data"].itemsize


@pytest.mark.parametrize("dtype", ["int64", "int32", "bool", "uint8"])
def test_tables_keep_their_type(dtype: str) -> None:
    encoding = Dense(dtype)
    x = torch.tensor([0, 1, 1]).to(encoding.torch_dtype)
    assert torch.equal(encoding.decode(encoding.encode(x), (3,)), x)
    assert encoding.stored_bits((3,)) == 8 * 3 * x.itemsize


def test_nothing_is_copied_that_need_not_be() -> None:
    x = torch.randn(4)
    encoding = Dense("float32")
    assert encoding.decode(encoding.encode(x), (4,)).data_ptr() == x.data_ptr()


def test_overflow_is_refused_but_stored_infinity_is_kept() -> None:
    with pytest.raises(SmeltError, match=r"overflows float16.*bfloat16"):
        Dense("float16").encode(torch.tensor([1e6]))
    mask = torch.tensor([0.0, float("-inf")])
    assert Dense("float16").encode(mask)["data"][1] == float("-inf")


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(SmeltError, match="did you mean 'float16'"):
        Dense("flaot16")
