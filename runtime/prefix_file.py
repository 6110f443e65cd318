"""A file of named blocks under hashes: a header in JSON that says where each block lies, then the blocks.

Layout: 8 bytes `SMELTKV1`; the header's length, uint64 little-endian; its SHA-256; the header; the blocks, without gaps
in the order of the header. A block is read, and its hash checked, when it is asked for, so that a reader takes from a
slow source no more than it needs. Nothing is unpickled, and nothing is allocated that the file's own size does not
bound.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..ir.errors import SmeltError

MAGIC = b"SMELTKV1"
START = struct.Struct("<8sQ32s")
HEADER = 1 << 26  # most bytes of a header: a million tokens in chunks of 256 at four levels have one of 4 MB


def write(path: Path, facts: Mapping[str, Any], blocks: Mapping[str, bytes]) -> int:
    """Write facts (JSON) and blocks; the file appears whole or not at all. Returns its size in bytes."""
    places, end = [], 0
    for name, data in blocks.items():
        places.append([name, end, end + len(data), hashlib.sha256(data).hexdigest()])
        end += len(data)
    header = json.dumps({"facts": facts, "blocks": places}, separators=(",", ":")).encode()
    if len(header) > HEADER:
        raise SmeltError(f"{path}: {len(blocks)} blocks need a header of {len(header)} bytes, {HEADER} are allowed")
    start = START.pack(MAGIC, len(header), hashlib.sha256(header).digest())
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as draft:
            try:
                draft.writelines((start, header, *blocks.values()))
                draft.flush()
                os.fsync(draft.fileno())
                Path(draft.name).replace(path)
            except BaseException:
                Path(draft.name).unlink(missing_ok=True)
                raise
    except OSError as fault:
        raise SmeltError(f"{path}: cannot be written ({fault.strerror or fault})") from fault
    return len(start) + len(header) + end


class Blocks:
    """The header of such a file, checked, and its blocks on demand; `taken` counts the bytes that were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = file.read(START.size)
                header = self._header(start, size, file.read(self._length(start, size)))
        except OSError as fault:
            raise SmeltError(f"{path}: cannot be read ({fault.strerror or fault})") from fault
        self.facts: dict[str, Any] = header["facts"]
        self.taken = size - self._end
        self._base = size - self._end

    def _length(self, start: bytes, size: int) -> int:
        if len(start) < START.size or not start.startswith(MAGIC[:7]):
            raise SmeltError(f"{self.path}: not a stored prefix, or one that was cut")
        magic, length, _ = START.unpack(start)
        if magic != MAGIC:
            raise SmeltError(f"{self.path}: a stored prefix of format {magic[7:]!r}, this smelt reads {MAGIC[7:]!r}")
        if length > min(HEADER, size - START.size):
            raise SmeltError(f"{self.path}: a header of {length} bytes does not fit; the file was cut or altered")
        return int(length)

    def _header(self, start: bytes, size: int, data: bytes) -> dict[str, Any]:
        if hashlib.sha256(data).digest() != START.unpack(start)[2]:
            raise SmeltError(f"{self.path}: the header does not match its hash; the file was altered or damaged")
        try:
            header = json.loads(data)
            facts, places = header["facts"], header["blocks"]
            self._places = {str(name): (int(first), int(last), str(digest)) for name, first, last, digest in places}
            ends = [0, *(last for _, last, _ in self._places.values())]
            firsts = [first for first, _, _ in self._places.values()]
        except (ValueError, KeyError, TypeError, RecursionError) as fault:
            raise SmeltError(f"{self.path}: the header is no table of blocks ({fault!r})") from fault
        if not isinstance(facts, dict) or firsts != ends[:-1] or ends != sorted(ends) or len(places) != len(firsts):
            raise SmeltError(f"{self.path}: the header's blocks overlap or leave gaps")
        self._end = ends[-1]
        if START.size + len(data) + self._end != size:
            what = "cut" if START.size + len(data) + self._end > size else "made longer"
            raise SmeltError(f"{self.path}: the file was {what}: its header announces {self._end} bytes of blocks")
        return {"facts": facts}

    @property
    def names(self) -> list[str]:
        """The blocks, in the order in which they lie."""
        return list(self._places)

    def size(self, name: str) -> int:
        """Bytes of a block."""
        first, last, _ = self._place(name)
        return last - first

    def read(self, name: str) -> bytes:
        """A block, its hash checked."""
        first, last, digest = self._place(name)
        try:
            with self.path.open("rb") as file:
                file.seek(self._base + first)
                data = file.read(last - first)
        except OSError as fault:
            raise SmeltError(f"{self.path}: cannot be read ({fault.strerror or fault})") from fault
        if hashlib.sha256(data).hexdigest() != digest:
            raise SmeltError(f"{self.path}: block '{name}' does not match its hash; the file was altered or damaged")
        self.taken += len(data)
        return data

    def _place(self, name: str) -> tuple[int, int, str]:
        if name not in self._places:
            raise SmeltError(f"{self.path}: has no block '{name}'; it was written by something else")
        return self._places[name]
