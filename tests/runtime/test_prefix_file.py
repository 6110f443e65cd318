"""A file of blocks gives back what was written, and no altered byte of it passes."""

import hashlib
import json
from pathlib import Path

import pytest

from smelt.ir.errors import SmeltError
from smelt.runtime.prefix_file import MAGIC, START, Blocks, write

BLOCKS = {"a": b"one", "empty": b"", "b": bytes(range(256))}


def forged(path: Path, header: bytes, blocks: bytes = b"") -> Path:
    path.write_bytes(START.pack(MAGIC, len(header), hashlib.sha256(header).digest()) + header + blocks)
    return path


def test_blocks_and_facts_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    size = write(path, {"tokens": 3}, BLOCKS)
    read = Blocks(path)
    assert size == path.stat().st_size and read.facts == {"tokens": 3} and read.names == list(BLOCKS)
    before = read.taken
    assert read.size("b") == 256 and read.taken == before
    assert {name: read.read(name) for name in BLOCKS} == BLOCKS
    assert read.taken == size  # what was read is all there is
    assert [p.name for p in tmp_path.iterdir()] == ["x.kv"]


def test_no_altered_byte_passes(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    write(path, {}, BLOCKS)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SmeltError, match=str(path)):
            read = Blocks(path)
            for name in BLOCKS:
                read.read(name)


@pytest.mark.parametrize("length", [0, 5, 40, 60, -256, -1])
def test_a_cut_file_is_refused_before_anything_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.kv"
    write(path, {}, BLOCKS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SmeltError, match="cut"):
        Blocks(path)


def test_a_longer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    write(path, {}, BLOCKS)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SmeltError, match="made longer"):
        Blocks(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "no table"),
        (b"{", "no table"),
        (b"[" * 100_000, "no table"),
        (b'{"facts": {}, "blocks": [["a", 0]]}', "no table"),
        (b'{"facts": [], "blocks": []}', "overlap"),
        (b'{"facts": {}, "blocks": [["a", 0, 2, ""], ["b", 1, 3, ""]]}', "overlap"),
        (b'{"facts": {}, "blocks": [["a", 1, 3, ""]]}', "overlap"),
        (b'{"facts": {}, "blocks": [["a", 0, 2, ""], ["a", 2, 3, ""]]}', "overlap"),
        (b'{"facts": {}, "blocks": [["a", 0, -2, ""]]}', "overlap"),
        (json.dumps({"facts": {}, "blocks": [["a", 0, 1 << 60, ""]]}).encode(), "cut"),
    ],
)
def test_a_forged_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        Blocks(forged(tmp_path / "x.kv", header, b"abc"))


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    path.write_bytes(START.pack(MAGIC, 1 << 62, bytes(32)) + b"{}")
    with pytest.raises(SmeltError, match="does not fit"):
        Blocks(path)


def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    path.write_bytes(START.pack(b"SMELTKV9", 2, bytes(32)) + b"{}")
    with pytest.raises(SmeltError, match="format b'9'"):
        Blocks(path)
    with pytest.raises(SmeltError, match="cannot be read"):
        Blocks(tmp_path / "none")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.kv"
    write(path, {}, BLOCKS)
    with pytest.raises(TypeError):
        write(path, {}, {"a": b"x", "b": None})  # type: ignore[dict-item]
    with pytest.raises(SmeltError, match="cannot be written"):
        write(tmp_path / "no" / "x.kv", {}, BLOCKS)
    assert Blocks(path).read("a") == b"one"
