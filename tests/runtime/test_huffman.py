"""Huffman codes on disk: every bit comes back, programs do not notice, and nothing that a file tells is believed."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import fx
from typer.testing import CliRunner

import smelt
from smelt.cli import app
from smelt.ir.encoding import Bitmap, Tiered
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.text.same import same_program
from smelt.ir.weight import Upon, Weight
from smelt.runtime import artefact, huffman

from .. import tiny
from ..ir.encoding.examples import EXAMPLES, samples
from .test_draft_model import drafting

WEIGHTS = artefact.WEIGHTS
DENSE = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def holding(weights: dict[str, Weight]) -> Program:
    """A program that gives out its weights."""
    graph = fx.Graph()
    graph.output({name: graph.create_node("get_attr", name) for name in weights})
    return Program("held", graph, weights, {"inputs": {}})


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    return Weight.of((torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 50).to(dtype))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: Program, second: Program) -> bool:
    """Whether all parts of all weights are the same, in type, shape and bits."""
    return first.weights.keys() == second.weights.keys() and all(
        {n: (p.dtype, p.shape, bits(p)) for n, p in weight.parts.items()}
        == {n: (p.dtype, p.shape, bits(p)) for n, p in second.weights[name].parts.items()}
        for name, weight in first.weights.items()
    )


def every_encoding() -> dict[str, Weight]:
    x = samples(8)
    held = {f"e{i}": Weight(tuple(x.shape), each[0], each[0].alone(x)) for i, each in enumerate(EXAMPLES.values())}
    x = x.flatten(0, 1)
    held["tiered"] = Weight(tuple(x.shape), *Tiered.coded(x.bfloat16()))
    held["bitmap"] = Weight(tuple(x.shape), *Bitmap().coded((x * (x.abs() > 1)).half()))
    held |= {f"d{dtype}": Weight.of((x * 20).clamp(0, 60).to(getattr(torch, dtype))) for dtype in DENSE}
    held["strange"] = Weight.of(torch.tensor([math.nan, -0.0, math.inf, 5e-324, 1] * 999, dtype=torch.float64))
    held["noise"] = Weight.of(torch.randint(256, (4096,), generator=torch.Generator().manual_seed(1)).to(torch.uint8))
    held |= {f"empty{shape}": Weight.of(torch.ones(shape)) for shape in ((0,), (3, 0), (0, 4, 5))}
    return held | {"scalar": Weight.of(torch.tensor(2.5)), "number": Weight.of(torch.tensor(7))}


def test_every_encoding_comes_back_to_the_bit(tmp_path: Path) -> None:
    program = holding(every_encoding())
    artefact.save(tmp_path / "plain", program, {}, {})
    artefact.save(tmp_path / "coded", program, {}, {}, coded=True)
    read, manifest = artefact.load(tmp_path / "coded")
    assert same_bits(program, read) and same_program(program, read) is None
    shrunk = manifest["disk"][WEIGHTS]["tensors"]
    assert {"dbfloat16/data", "tiered/start", "bitmap/value", "strange/data"} <= shrunk.keys()
    assert not {"noise/data", "scalar/data", "empty(0,)/data"} & shrunk.keys()
    before, after = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("plain", "coded"))
    assert after < 0.9 * before
    damaged = program.fork()
    damaged.weights["number"] = Weight.of(torch.tensor(8))
    assert not same_bits(damaged, read)


def test_what_certificates_name_is_not_of_the_disk(tmp_path: Path) -> None:
    """Program and weights have the hashes that they have in a plain artefact, which a coded one becomes again."""
    program = holding(every_encoding())
    artefact.save(tmp_path / "plain", program, {}, {})
    artefact.save(tmp_path / "coded", program, {}, {}, coded=True)
    read, manifest = artefact.load(tmp_path / "coded")
    plain = artefact.read_manifest(tmp_path / "plain")
    assert manifest["files"][WEIGHTS] != plain["files"][WEIGHTS] and "disk" not in plain
    for name in (artefact.PROGRAM, WEIGHTS):
        assert artefact.plain_hash(manifest, name) == artefact.plain_hash(plain, name) == plain["files"][name]
    artefact.save(tmp_path / "again", read, {}, {})
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_codes_take_what_the_entropy_says(tmp_path: Path) -> None:
    """Two percent more at most; the low bytes of bfloat16 are noise, and stay as they are."""
    program = holding({"w": gaussian(1024, 1024)})
    artefact.save(tmp_path / "out", program, {}, {}, coded=True)
    told = artefact.read_manifest(tmp_path / "out")["disk"][WEIGHTS]["tensors"]["w/data"]
    high = np.frombuffer(bits(program.weights["w"].parts["data"]), np.uint8)[1::2]
    shares = np.bincount(high)[np.bincount(high) > 0] / high.size
    entropy = -(shares * np.log2(shares)).sum() * high.size / 8
    assert told["planes"][0] is None
    assert entropy < sum(told["planes"][1]) < 1.02 * entropy < 0.5 * high.size


def test_a_compiled_model_answers_the_same_and_stays_coded(tmp_path: Path) -> None:
    lm = smelt.load(tiny.artefact())
    assert not lm.coded
    lm.save(tmp_path / "coded", huffman=True)
    again = smelt.load(tmp_path / "coded")
    assert again.coded and "disk" not in again.facts
    assert again.generate([5, 6, 7], max_new_tokens=4) == lm.generate([5, 6, 7], max_new_tokens=4)
    again.save(tmp_path / "again")  # as `smelt tune` does
    again.save(tmp_path / "plain", huffman=False)
    sizes = {n: (tmp_path / n / WEIGHTS).stat().st_size for n in ("coded", "again", "plain")}
    assert sizes["coded"] == sizes["again"] < 0.9 * sizes["plain"]
    assert sizes["plain"] == (tiny.artefact() / WEIGHTS).stat().st_size


def test_the_command_line_codes_and_tells(tmp_path: Path) -> None:
    words = ["compile", str(tiny.model()), "none", "--target", "torch", "-o", str(tmp_path / "out"), "--huffman"]
    assert CliRunner().invoke(app, words).exit_code == 0
    told = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert told["disk_coding"] == "huffman"
    assert told["disk_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert "on disk (huffman)" in CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    plain = CliRunner().invoke(app, ["inspect", str(tiny.artefact())]).stdout
    assert "on disk" in plain and "huffman" not in plain


def test_a_draft_model_and_what_stands_upon_a_base_are_coded_too(tmp_path: Path) -> None:
    program = drafting(depth=2)
    artefact.save(tmp_path / "draft", program, {}, {}, coded=True)
    loaded, manifest = artefact.load(tmp_path / "draft")
    assert same_program(program, loaded) is None and loaded.nbytes == program.nbytes
    assert manifest["disk"].keys() == {name for name in manifest["files"] if name.endswith(".safetensors")}
    base = holding({"w": gaussian(64, 1024)})
    tuned = holding({"w": Weight((64, 1024), base.weights["w"].encoding, Upon("w", base.weights["w"], {}))})
    tuned.base = base
    artefact.save(tmp_path / "base", base, {}, {}, coded=True)
    artefact.save(tmp_path / "tuned", tuned, {}, {}, coded=True)
    assert same_bits(artefact.load(tmp_path / "tuned", artefact.load(tmp_path / "base")[0])[0], base)


values = st.one_of(
    st.builds(lambda n, v: np.full(n, v, np.uint8), st.integers(0, 400), st.integers(0, 255)),
    st.builds(
        lambda n, most, seed: np.random.default_rng(seed).integers(0, most, n).astype(np.uint8),
        st.integers(0, 400), st.sampled_from([2, 3, 16, 256]), st.integers(0, 9),
    ),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from("abcde"), st.tuples(values, st.sampled_from(DENSE))), st.integers(1, 99))
@settings(deadline=None, max_examples=50)
def test_any_bytes_come_back(made: dict[str, tuple[Any, str]], chunk: int) -> None:
    """In chunks of any size, whatever gains and whatever does not."""
    tensors = {}
    for name, (data, dtype) in made.items():
        kind: torch.dtype = getattr(torch, dtype)
        data = data % 2 if dtype == "bool" else data
        tensors[name] = torch.zeros(len(data) // kind.itemsize, dtype=kind)
        tensors[name].view(torch.uint8)[:] = torch.from_numpy(data[: tensors[name].nbytes])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "a.safetensors"
        save_file(tensors, path)
        with mock.patch.multiple(huffman, CHUNK=chunk, WORTH=1):
            told = json.loads(json.dumps(huffman.shrink(path)))
        found = huffman.entries(path, told)
        assert {n: (e.dtype, e.shape) for n, e in found.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
        back = huffman.decode(path, told, tensors)
        assert {n: (t.dtype, bits(t)) for n, t in back.items()} == {n: (t.dtype, bits(t)) for n, t in tensors.items()}
        assert [p.name for p in Path(place).iterdir()] == ["a.safetensors"]


def tampered(folder: Path, change: Callable[[dict[str, torch.Tensor], Any], None]) -> Path:
    """An artefact of one weight [64, 4096] in chunks of 64 KiB, whose file and manifest someone changed and sealed."""
    with mock.patch.object(huffman, "CHUNK", 1 << 16):
        artefact.save(folder, holding({"w": gaussian(64, 4096)}), {}, {}, coded=True)
    tensors, manifest = load_file(folder / WEIGHTS), json.loads((folder / "manifest.json").read_text())
    change(tensors, manifest)
    save_file(tensors, folder / WEIGHTS)
    manifest["files"][WEIGHTS] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())
    return folder


def told(manifest: Any) -> Any:
    return manifest["disk"][WEIGHTS]["tensors"]["w/data"]


def put(tensors: dict[str, torch.Tensor], manifest: Any, change: Callable[[bytes], bytes]) -> None:
    """Another last stream, of the size that is told."""
    sizes, data = told(manifest)["planes"][1], tensors["w/data:1"].numpy().tobytes()
    last = change(data[-sizes[-1] :])
    tensors["w/data:1"] = torch.frombuffer(bytearray(data[: -sizes[-1]] + last), dtype=torch.uint8)
    sizes[-1] = len(last)


def flipped(stream: bytes) -> bytes:
    return stream[:9000] + bytes([stream[9000] ^ 4]) + stream[9001:]


HALF = 1 << 15  # bytes of half a chunk

FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor], Any], Any], str]] = {
    "a changed bit": (lambda t, m: put(t, m, flipped), "a stream (is damaged|does not hold)"),
    "a changed sum": (lambda t, m: put(t, m, lambda s: s[:-1] + bytes([s[-1] ^ 1])), "a stream is damaged"),
    "a cut stream": (lambda t, m: put(t, m, lambda s: s[:-9]), "a stream does not hold 65536 bytes"),
    "a cut sum": (lambda t, m: put(t, m, lambda s: s[:-1]), "a stream does not hold 65536 bytes"),
    "bytes behind it": (lambda t, m: put(t, m, lambda s: s + b"x"), "a stream does not hold 65536 bytes"),
    "too few bytes": (lambda t, m: put(t, m, lambda s: zlib.compress(bytes(range(256)) * 255, 0)), "hold 65536 bytes"),
    "a byte too many": (lambda t, m: put(t, m, lambda s: zlib.compress(b"ab" * HALF + b"c", 0)), "hold 65536 bytes"),
    "a bomb": (lambda t, m: put(t, m, lambda s: zlib.compress(bytes(1 << 26))), "a stream does not hold 65536 bytes"),
    "too small a stream": (lambda t, m: put(t, m, lambda s: s[:99]), "99 bytes cannot hold the 65536 of a chunk"),
    "no stream": (lambda t, m: told(m)["planes"][1].pop(), "its plane 1 is torch.uint8 of shape"),
    "too few chunks": (lambda t, m: put(t, m, lambda s: s) or told(m)["planes"].__setitem__(1, [len(t["w/data:1"])]),
                       "its plane 1 has 1 chunks of 65536 bytes for 262144"),
    "a longer plane": (lambda t, m: t.update({"w/data:0": torch.zeros(99, dtype=torch.uint8)}),
                       r"its plane 0 is torch.uint8 of shape \[99\], not 262144 bytes"),
    "another type": (lambda t, m: t.update({"w/data:0": t["w/data:0"].view(torch.int8)}), "its plane 0 is torch.int8"),
    "no plane": (lambda t, m: t.pop("w/data:0"), "its plane 0 is missing"),
    "a plane too few": (lambda t, m: told(m)["planes"].pop(), "tells of 'w/data' cannot be read.*1 planes of bfloat16"),
    "twice": (lambda t, m: t.update({"w/data": torch.zeros(3)}), "it is there twice"),
    "another shape": (lambda t, m: m["weights"]["w"].update(shape=[64, 4095]), "'w' has 4194304 bits, dense.* 4193280"),
    "a huge shape": (lambda t, m: told(m).update(shape=[1 << 40, 99]), "its plane 0 is .* not 108851651149824 bytes"),
    "below nothing": (lambda t, m: told(m).update(shape=[-64, 4096]), "'w/data' cannot be read.*-64 is no count"),
    "a pickle's type": (lambda t, m: told(m).update(dtype="load"), "'w/data' cannot be read.*of type load"),
    "no shape": (lambda t, m: told(m).pop("shape"), "'w/data' cannot be read"),
    "no size": (lambda t, m: told(m)["planes"].__setitem__(1, ["9"]), "'w/data' cannot be read.*'9' is no count"),
    "no chunks": (lambda t, m: m["disk"][WEIGHTS].update(chunk=0), "cannot be read.*chunks of 0 bytes"),
    "another coding": (lambda t, m: m["disk"][WEIGHTS].update(coding="rans"), "coded as 'rans', this smelt reads"),
    "no coding": (lambda t, m: m["disk"].update({WEIGHTS: [1]}), r"coded as \[1\]"),
    "no table": (lambda t, m: m["disk"].pop(WEIGHTS), "has no tensor 'w/data'"),
    "no disk": (lambda t, m: m.update(disk=[1]), "does not list"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_made_up_is_refused(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(SmeltError, match=message) as caught:
        artefact.load(tampered(tmp_path / "out", change))
    assert fault == "no disk" or WEIGHTS in str(caught.value)


def test_an_untouched_one_is_not(tmp_path: Path) -> None:
    assert same_bits(
        artefact.load(tampered(tmp_path / "out", lambda t, m: None))[0], holding({"w": gaussian(64, 4096)})
    )


def test_nothing_is_inflated_beyond_what_was_promised(tmp_path: Path) -> None:
    folder = tampered(tmp_path / "out", FAULTS["a bomb"][0])
    right, most = zlib.decompressobj, []

    class Watched:
        def __init__(self) -> None:
            self.inner = right()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def decompress(self, data: Any, limit: int) -> bytes:
            most.append(limit)
            return self.inner.decompress(data, limit)

    with mock.patch.object(huffman.zlib, "decompressobj", Watched), pytest.raises(SmeltError, match="does not hold"):
        artefact.load(folder)
    assert min(most) > 0 and max(most) == 1 << 16


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
@pytest.mark.parametrize("function", ["smelt.runtime.huffman.save_file", "pathlib.Path.replace"])
def test_a_full_disk_leaves_what_was_there(
    function: str, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact.save(tmp_path / "out", holding({"w": gaussian(3, 4)}), {}, {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def failing(*args: Any, **options: Any) -> None:
        raise fault

    monkeypatch.setattr(function, failing)
    for target in ("out", "fresh"):
        with pytest.raises(SmeltError if isinstance(fault, OSError) else KeyboardInterrupt):
            artefact.save(tmp_path / target, holding({"w": gaussian(64, 4096)}), {}, {}, coded=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
