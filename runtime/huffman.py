"""A safetensors file with its tensors in Huffman codes: less on disk, the same numbers to the bit once it is read.

A tensor is taken apart into planes, the first bytes of all its elements, then the second ones, …: those with exponents
and those with codes of a few bits are uneven, the others noise. Each plane is cut into chunks, which are coded and
decoded side by side by zlib without its search for repetitions, which weights do not have (bfloat16 of the bundled
model takes 67 % so, and more with the search). What gains nothing stays as it is.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from ..ir.capture.checkpoint import Entry, read_header
from ..ir.errors import SmeltError
from ..ir.folders import sha256
from ..ir.weight import Mapped

CODING = "huffman"
CHUNK = 1 << 20  # bytes of a plane that are coded together: some ms of work, and 0.01 % for what a stream begins with
WORTH = 512  # bytes that a tensor must save, which is what the manifest needs to say how it lies
MOST = 8  # times that bytes can shrink, whose shortest code is a bit
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Coded:
    """How a tensor lies in its file: of each plane the bytes of its chunks' streams, or None where it lies as it is."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    planes: tuple[list[int] | None, ...]
    chunk: int

    @property
    def size(self) -> int:
        """Bytes of a plane."""
        return math.prod(self.shape)

    def check(self, i: int, entry: Entry | None) -> None:
        """Raises SmeltError if `entry`, of the file's header, cannot be plane `i`."""
        if entry is None:
            self.fail(f"its plane {i} is missing")
        sizes = self.planes[i]
        wanted = self.size if sizes is None else sum(sizes)
        if entry.dtype != torch.uint8 or entry.shape != (wanted,):
            self.fail(f"its plane {i} is {entry.dtype} of shape {list(entry.shape)}, not {wanted} bytes")
        if sizes is None:
            return
        if len(sizes) != -(-self.size // self.chunk):
            self.fail(f"its plane {i} has {len(sizes)} chunks of {self.chunk} bytes for {self.size}")
        for begin, size in zip(range(0, self.size, self.chunk), sizes, strict=True):
            if min(self.chunk, self.size - begin) > MOST * size:
                self.fail(f"{size} bytes cannot hold the {min(self.chunk, self.size - begin)} of a chunk of it")

    def pieces(self, i: int) -> Iterator[tuple[slice, Bytes, bool]]:
        """Of plane `i`, piece by piece: its place, its bytes in the file, and whether they are coded."""
        stored, sizes = Mapped({"": (self.path, place(self.key, i))})[""].numpy(), self.planes[i]
        at = 0
        for n, begin in enumerate(range(0, self.size, self.chunk)):
            end = min(begin + self.chunk, self.size)
            length = end - begin if sizes is None else sizes[n]
            yield slice(begin, end), stored[at : at + length], sizes is not None
            at += length

    def fill(self, target: Bytes, stored: Bytes, coded: bool) -> None:
        """Put a piece of a plane into `target`, whose size says how much it must be."""
        target[:] = np.frombuffer(self._inflated(stored, len(target)), np.uint8) if coded else stored

    def fail(self, fault: str) -> NoReturn:
        raise SmeltError(f"{self.path}: '{self.key}' cannot be decoded, {fault}; compile or copy the artefact again")

    def _inflated(self, stored: Bytes, size: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(stored.data, size)
            more = stream.decompress(stream.unconsumed_tail, 1)  # reads the end, which has a sum of all bytes
        except zlib.error as fault:
            self.fail(f"a stream is damaged ({fault})")
        if len(data) != size or more or stream.unused_data or not stream.eof:
            self.fail(f"a stream does not hold {size} bytes")
        return data


def shrink(path: Path) -> dict[str, Any]:
    """Code a file in place; returns what the others here need to know of it, and its hash before.

    Raises OSError where there is no room: while it works, the file lies there twice.
    """
    kept: dict[str, torch.Tensor] = {}
    listed: dict[str, Any] = {}
    with ThreadPoolExecutor() as pool:
        for key, entry in sorted(read_header(path).items()):
            tensor = entry.read()  # which safetensors keeps contiguous
            planes = [np.ascontiguousarray(plane) for plane in _bytes(tensor).T]
            coded = [list(pool.map(_stream, _chunks(plane))) for plane in planes]
            gains = [len(plane) - sum(map(len, streams)) for plane, streams in zip(planes, coded, strict=True)]
            if sum(gain for gain in gains if gain > 0) < WORTH:
                kept[key] = tensor
                continue
            for i, gain in enumerate(gains):
                data = np.frombuffer(bytearray().join(coded[i]), np.uint8) if gain > 0 else planes[i]
                kept[place(key, i)] = torch.from_numpy(data)
            listed[key] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "planes": [[*map(len, coded[i])] if gain > 0 else None for i, gain in enumerate(gains)],
            }
    before = sha256(path)
    draft = path.with_suffix(".coded")
    save_file(kept, draft)
    draft.replace(path)
    return {"coding": CODING, "chunk": CHUNK, "plain": before, "tensors": listed}


def entries(path: Path, told: Mapping[str, Any] | None) -> dict[str, Entry]:
    """The tensors of a file as it was before it was coded, by its header and by what `shrink` told; none is read.

    Nothing that is told is believed: sizes must be those of what lies in the file. Raises SmeltError.
    """
    stored = read_header(path)
    for key, tensor in _told(path, told).items():
        for i in range(len(tensor.planes)):
            tensor.check(i, stored.pop(place(key, i), None))
        if key in stored:
            tensor.fail("it is there twice")
        stored[key] = Entry(path, key, tensor.dtype, tensor.shape)
    return stored


def decode(path: Path, told: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, torch.Tensor]:
    """These tensors of a file whose `entries` were looked at; those that are not coded stay mapped.

    Raises SmeltError naming file and tensor for streams that are damaged, or hold more or less than their tensor.
    """
    coded = _told(path, told)
    out = {key: Mapped({"": (path, key)})[""] for key in keys if key not in coded}
    pool, jobs = ThreadPoolExecutor(), []
    try:
        for key, tensor in ((key, coded[key]) for key in keys if key in coded):
            out[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
            data = _bytes(out[key])
            for i in range(len(tensor.planes)):
                for span, stored, yes in tensor.pieces(i):
                    jobs.append(pool.submit(tensor.fill, data[span, i], stored, yes))
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return out


def place(key: str, plane: int) -> str:
    """The name under which a plane of a tensor lies in the file."""
    return f"{key}:{plane}"


def _told(path: Path, told: Mapping[str, Any] | None) -> dict[str, Coded]:
    """What was told of a file's tensors, in types that can be worked with; its numbers may still be wrong."""
    if told is None:
        return {}
    coding = told.get("coding") if isinstance(told, Mapping) else told
    if coding != CODING:
        raise SmeltError(f"{path}: its tensors are coded as {coding!r}, this smelt reads {CODING!r}; update smelt")
    key, found = "", {}
    try:
        if not (chunk := _count(told["chunk"])):
            raise ValueError("chunks of 0 bytes")
        for key, entry in told["tensors"].items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"of type {entry['dtype']}")
            dtype, shape = getattr(torch, entry["dtype"]), tuple(map(_count, entry["shape"]))
            planes = tuple(None if sizes is None else [*map(_count, sizes)] for sizes in entry["planes"])
            if len(planes) != dtype.itemsize:
                raise ValueError(f"{len(planes)} planes of {entry['dtype']}")
            found[key] = Coded(path, key, dtype, shape, planes, chunk)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise SmeltError(f"{path}: what the manifest tells of '{key}' cannot be read ({fault!r})") from fault
    return found


def _count(given: Any) -> int:
    if type(given) is not int or not 0 <= given < 1 << 48:
        raise ValueError(f"{given!r} is no count")
    return given


def _bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous tensor, a row an element and a column a plane."""
    return tensor.view(-1).view(torch.uint8).numpy().reshape(tensor.numel(), tensor.element_size())


def _chunks(plane: Bytes) -> list[Bytes]:
    return [plane[at : at + CHUNK] for at in range(0, len(plane), CHUNK)]


def _stream(chunk: Bytes) -> bytes:
    coder = zlib.compressobj(memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(chunk.data) + coder.flush()
