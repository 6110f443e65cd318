"""Element types that torch lacks: codes of 4 and 2 bits travel in bytes that are marked with the type of the file.

int4 and int2 are held as int8, uint4 and uint2 as uint8, float4e2m1 as float8_e4m3fn, which has all of its values; in a
Program the float types of 8 and 4 bits are float32, and keep their mark. It is needed where a type is taken from a
tensor (CastLike, a zero point); it stays on whatever ops move elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx import TensorProto

RANGES: dict[int, tuple[int, int]] = {
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT2: (-2, 1),
}
NARROW = frozenset({*RANGES, TensorProto.FLOAT4E2M1})
FLOAT8: dict[int, torch.dtype] = {
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
}
_MARKED = NARROW | FLOAT8.keys()  # float8 is held as float32 in a Program
_CHANGING = {"Cast", "CastLike", "BitCast", "QuantizeLinear", "DequantizeLinear"}  # they say their result's type


def marked(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The tensor, a fresh one, with its element type in the file."""
    if kind in _MARKED:
        tensor.onnx_kind = kind  # type: ignore[attr-defined]
    return tensor


def kind_of(value: Any) -> int | None:
    """The narrow element type of a tensor, None if torch's own type says it."""
    return getattr(value, "onnx_kind", None)


def carry(op: str, inputs: Sequence[Any], values: Sequence[Any]) -> None:
    """Marks the results of an op that moves elements: only such ops take narrow types."""
    kind = next((kind_of(value) for value in inputs if kind_of(value) is not None), None)
    if kind is None or op in _CHANGING:
        return
    held = next(value.dtype for value in inputs if kind_of(value) is not None)
    for value in values:
        if isinstance(value, torch.Tensor) and value.dtype == held and kind_of(value) is None:
            marked(value, kind)
