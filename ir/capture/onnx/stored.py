"""Tensors of ONNX files: each size is checked against the bytes that are there; nothing is read before it is used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from ...encoding import Dense
from ...errors import SmeltError
from ...weight import Weight

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
}
# several codes to a byte, the first in the lowest bits: bits and the type that holds one code unpacked
PACKED: dict[int, tuple[int, torch.dtype]] = {
    TensorProto.UINT4: (4, torch.uint8),
    TensorProto.INT4: (4, torch.int8),
    TensorProto.UINT2: (2, torch.uint8),
    TensorProto.INT2: (2, torch.int8),
    TensorProto.FLOAT4E2M1: (4, torch.float8_e4m3fn),  # which has all of its values
}
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dtype_of(kind: int, where: str) -> torch.dtype:
    """The torch type of an ONNX element type; raises SmeltError for one that torch has not."""
    if kind in PACKED:
        return PACKED[kind][1]
    if kind not in DTYPES:
        known = TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else str(kind)
        raise SmeltError(f"{where}: tensors of type {known} have no counterpart in torch")
    return DTYPES[kind]


@dataclass(frozen=True)
class Stored:
    """A tensor of an ONNX file, in the file's own bytes or in another file of the folder."""

    name: str
    kind: int  # TensorProto.DataType
    shape: tuple[int, ...]
    data: bytes | None = None
    path: Path | None = None
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type that `read` returns."""
        return dtype_of(self.kind, self.name)

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return size_in_bytes(self.kind, self.shape, self.name)

    def raw(self) -> torch.Tensor:
        """The file's bytes, uint8 [nbytes], mapped and not copied."""
        if not self.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        if self.path is not None:
            mapped = np.memmap(self.path, np.uint8, "c", self.offset, (self.nbytes,))
            return torch.from_numpy(mapped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the bytes are read-only, and nobody writes
            return torch.frombuffer(self.data or b"", dtype=torch.uint8)

    def read(self) -> torch.Tensor:
        """The tensor; codes of fewer than 8 bits come one to a byte."""
        raw = self.raw()
        if self.kind not in PACKED:
            if raw.data_ptr() % max(1, self.dtype.itemsize):
                raw = raw.clone()  # offsets in a file need not be multiples of the element
            return (
                raw.view(self.dtype).reshape(self.shape) if raw.numel() else torch.empty(self.shape, dtype=self.dtype)
            )
        bits, held = PACKED[self.kind]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes: torch.Tensor = ((raw[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[: self.count].reshape(self.shape)
        if held is torch.int8:
            codes = codes.to(torch.int8)
            codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        if self.kind == TensorProto.FLOAT4E2M1:
            return torch.tensor(_FLOAT4)[codes.long()].to(held)
        return codes

    def array(self) -> Any:
        """A small tensor in numpy, which works while torch is being traced; for types that numpy has."""
        if self.path is not None:
            raw = (
                np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
                if self.nbytes
                else np.empty(0, np.uint8)
            )
        else:
            raw = np.frombuffer(self.data or b"", np.uint8)
        if self.kind not in PACKED:
            return np.frombuffer(raw.tobytes(), str(self.dtype).removeprefix("torch.")).reshape(self.shape)
        bits, held = PACKED[self.kind]
        codes = ((raw[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)).reshape(-1)[: self.count]
        if held is torch.int8:
            codes = codes.astype(np.int8)
            codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
        return codes.reshape(self.shape)

    def weight(self) -> Weight:
        """A dense weight that stays where it is."""
        return Weight(self.shape, Dense(str(self.dtype).removeprefix("torch.")), Lazy(self))


@dataclass(frozen=True)
class Lazy(Mapping[str, torch.Tensor]):
    """The part of a dense weight, read on each access."""

    stored: Stored

    def __getitem__(self, part: str) -> torch.Tensor:
        if part != "data":
            raise KeyError(part)
        return self.stored.read()

    def __iter__(self) -> Iterator[str]:
        return iter(("data",))

    def __len__(self) -> int:
        return 1


def size_in_bytes(kind: int, shape: tuple[int, ...], where: str) -> int:
    """Bytes of a tensor as files store it."""
    if kind in PACKED:
        return -(-math.prod(shape) * PACKED[kind][0] // 8)
    return math.prod(shape) * dtype_of(kind, where).itemsize


def stored(proto: Any, folder: Path, where: str) -> Stored:
    """A checked TensorProto; raises SmeltError for data that is missing, of another size, or outside `folder`."""
    where = f"{where}: tensor '{proto.name}'"
    shape, kind = tuple(int(d) for d in proto.dims), int(proto.data_type)
    if min(shape, default=0) < 0:
        raise SmeltError(f"{where} has a negative dimension in {list(shape)}")
    if proto.HasField("segment"):
        raise SmeltError(f"{where} is stored in segments, which nothing writes; save the model again")
    need = size_in_bytes(kind, shape, where)
    if proto.data_location == TensorProto.EXTERNAL:
        path, offset = _external(proto, folder, need, where)
        return Stored(proto.name, kind, shape, None, path, offset)
    data = proto.raw_data if proto.HasField("raw_data") else _typed(proto, kind, shape, where)
    if len(data) != need:
        raise SmeltError(f"{where} of shape {list(shape)} needs {need} bytes, the file holds {len(data)}")
    return Stored(proto.name, kind, shape, data)


_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_NUMPY: dict[str, Any] = {
    "float_data": np.float32,
    "int32_data": np.int32,
    "int64_data": np.int64,
    "double_data": np.float64,
    "uint64_data": np.uint64,
}
# element types that live in a wider field, by the number type of their bits
_NARROW: dict[int, Any] = {
    TensorProto.UINT16: np.uint16,
    TensorProto.INT16: np.uint16,
    TensorProto.FLOAT16: np.uint16,
    TensorProto.BFLOAT16: np.uint16,
    TensorProto.UINT32: np.uint32,
    TensorProto.INT32: np.uint32,
}


def _typed(proto: Any, kind: int, shape: tuple[int, ...], where: str) -> bytes:
    """The values of a typed field as raw bytes."""
    field = next((name for name in _FIELDS if len(getattr(proto, name))), None)
    if field is None:
        if math.prod(shape):
            raise SmeltError(f"{where} of shape {list(shape)} has no values in the file")
        return b""
    values = np.array(getattr(proto, field), _NUMPY[field])
    if field in ("int32_data", "uint64_data") and kind not in (TensorProto.UINT64, TensorProto.INT32):
        values = values.astype(_NARROW.get(kind, np.uint8), casting="unsafe")
    count = math.prod(shape) * (2 if kind in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1)
    packed = 8 // PACKED[kind][0] if kind in PACKED else 1
    if len(values) != -(-count // packed):
        raise SmeltError(f"{where} of shape {list(shape)} needs {count} values, the file holds {len(values)}")
    return values.tobytes()


def _external(proto: Any, folder: Path, need: int, where: str) -> tuple[Path, int]:
    """The file and offset of external data, inside `folder` and large enough."""
    told = {entry.key: entry.value for entry in proto.external_data}
    location = told.get("location", "")
    path, root = Path(location), folder.resolve()
    if not location or path.is_absolute() or ".." in path.parts or "\\" in location:
        raise SmeltError(f"{where} points to '{location}'; data must be a file in the model's folder")
    real = (folder / path).resolve()
    if not real.is_relative_to(root):
        raise SmeltError(f"{where} points to '{location}', a link out of the model's folder; copy the file there")
    if not real.is_file():
        raise SmeltError(f"{where} is stored in '{location}', which is missing; it belongs beside the .onnx file")
    try:
        offset, length = int(told.get("offset") or 0), int(told.get("length") or need)
    except ValueError as fault:
        raise SmeltError(f"{where}: offset and length of its external data are not numbers ({fault})") from fault
    size = real.stat().st_size
    if length != need:
        raise SmeltError(f"{where} needs {need} bytes, its external data is said to be {length} long")
    if offset < 0 or offset + length > size:
        raise SmeltError(f"{where} ends at byte {offset + length} of '{location}', which holds {size}: truncated")
    return real, offset
