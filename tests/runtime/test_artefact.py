"""The artefact: what is read back is what was written, an altered byte is found, a folder is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.codegen.fused import ProductKernel
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.text import parse_program, print_program
from smelt.ir.text.same import same_program
from smelt.ir.weight import Mapped, Weight
from smelt.runtime import artefact

from .. import tiny
from ..ir.programs import affine_layer, captured, rich

FILES = {"manifest.json", "manifest.sha256", "program.txt", "weights.safetensors"}
ASSETS = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"}


def written(folder: Path, program: Program | None = None, **facts: Any) -> Path:
    artefact.save(folder, program or affine_layer(), ASSETS, {"recipe": {"name": "none"}, **facts})
    return folder


def sealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The artefact with its manifest changed by someone who also makes the hash fit."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return folder


def rehashed(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return sealed(folder, lambda m: m["files"].update({name: hashlib.sha256(content).hexdigest()}))


@pytest.mark.parametrize("make", [affine_layer, rich, lambda: captured("gpt2")], ids=["layer", "rich", "gpt2"])
def test_a_program_is_read_back_the_same(make: Callable[[], Program], tmp_path: Path) -> None:
    program = make()
    read, manifest = artefact.load(written(tmp_path / "a.smelt", program, calibration="c0ffee"))
    assert same_program(program, parse_program(print_program(program), program.weights)) is None
    assert same_program(program, read) is None
    assert manifest["calibration"] == "c0ffee" and manifest["recipe"] == {"name": "none"}
    assert set(manifest["files"]) == {"program.txt", "weights.safetensors", *ASSETS}
    assert {path.name for path in (tmp_path / "a.smelt").iterdir()} == FILES | set(ASSETS)
    assert (tmp_path / "a.smelt" / "tokenizer.json").read_bytes() == b"{}"


def test_another_program_is_not_the_same(tmp_path: Path) -> None:
    """The comparison above sees a changed weight, encoding and node."""
    read, _ = artefact.load(written(tmp_path / "a.smelt"))
    scaled, coded, longer = affine_layer(), affine_layer(), affine_layer()
    scaled.weights["layer.weight"] = Weight.of(scaled.weights["layer.weight"].dense() * 1.05)
    coded.weights["layer.weight"] = Weight.of(torch.zeros(3, 4)).encoded(Affine(8, 4))
    longer.set_output("z", next(iter(longer.outputs.values())))
    assert all(same_program(read, other) is not None for other in (scaled, coded, longer))


def test_writing_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", rich()), written(tmp_path / "b", rich())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_weights_that_share_memory_and_strided_ones_are_written(tmp_path: Path) -> None:
    program, both = affine_layer(), torch.arange(24.0).view(4, 6)
    program.weights = {"layer.weight": Weight.of(both[:, :3].t()), "layer.bias": Weight.of(both.view(-1)[:3])}
    program.weights["again"] = Weight.of(both.view(-1)[:3])
    with program.graph.inserting_before(program.graph.output_node()):
        program.set_output("again", program.graph.create_node("get_attr", "again"))
    read, _ = artefact.load(written(tmp_path / "a", program))
    assert all(torch.equal(read.weights[n].dense(), w.dense()) for n, w in program.weights.items())


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    """A bit of the first, the last and 24 more bytes of every file."""
    folder, at = written(tmp_path / "a.smelt", captured("llama")), torch.Generator().manual_seed(0)
    for path in sorted(folder.iterdir()):
        right = path.read_bytes()
        places = torch.randint(0, len(right), (24,), generator=at).tolist()
        for place in {0, len(right) - 1, *places}:
            wrong = bytearray(right)
            wrong[place] ^= 1 << (place % 8)
            path.write_bytes(wrong)
            with pytest.raises(SmeltError, match=r"altered or damaged"):
                artefact.load(folder)
        path.write_bytes(right[:-1])
        with pytest.raises(SmeltError):
            artefact.load(folder)
        path.write_bytes(right + b"\n")
        with pytest.raises(SmeltError):
            artefact.load(folder)
        path.write_bytes(right)
    artefact.load(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in sorted(FILES | set(ASSETS)):
        folder = written(tmp_path / name / "a.smelt")
        (folder / name).unlink()
        with pytest.raises(SmeltError, match="half copied" if "manifest" in name else f"{name}.*missing"):
            artefact.load(folder)


def test_a_file_that_was_added_is_refused_where_it_could_be_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.smelt")
    (folder / "README.md").write_text("mine")
    artefact.load(folder)
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(SmeltError, match=r"config\.json: not a file of the artefact, which is sealed; remove it"):
        artefact.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a smelt artefact"), ({}, "not a smelt artefact"), ({"weights.safetensors": b"x"}, "half copied")],
    ids=["nothing", "empty", "half"],
)
def test_what_is_no_artefact_is_said_to_be_none(content: dict[str, bytes] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "a.smelt"
    if content is not None:
        folder.mkdir()
    for name, written_bytes in (content or {}).items():
        (folder / name).write_bytes(written_bytes)
    with pytest.raises(SmeltError, match=message):
        artefact.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "artefact format 2, this smelt reads format 1; update smelt"),
        (lambda m: m.pop("format"), "artefact format None"),
        (lambda m: m["files"].update({"../secret": "00"}), r"lists the file '\.\./secret', which lies outside"),
        (lambda m: m["files"].update({"/etc/hostname": "00"}), "'/etc/hostname', which lies outside"),
        (lambda m: m["files"].update({"sub/file": "00"}), "'sub/file', which lies outside"),
        (lambda m: m["files"].pop("weights.safetensors"), r"does not list program\.txt and weights\.safetensors"),
        (lambda m: m.update(files=["program.txt"]), "does not list"),
        (lambda m: m.update(weights=None), "does not list"),
        (lambda m: m["weights"]["layer.weight"].update(shape=[3000, 4000]), "has 384 bits, dense.*384000000"),
        (lambda m: m["weights"]["layer.weight"].update(parts=["data", "more"]), "no tensor 'layer.weight/more'"),
        (lambda m: m["weights"]["layer.weight"].update(encoding={"pickle": {}}), "unknown encoding 'pickle'"),
        (lambda m: m["weights"]["layer.weight"].pop("shape"), "table of weights cannot be read"),
        (lambda m: m["weights"].update({"layer.weight": [1]}), "table of weights cannot be read"),
        (lambda m: m["weights"].pop("layer.weight"), "layer.weight"),
    ],
)
def test_a_manifest_that_was_made_up_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SmeltError, match=message):
        artefact.load(sealed(written(tmp_path / "a.smelt"), change))


def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.smelt")
    for content in (b"[1]", b"{", b"\xff"):
        (folder / "manifest.json").write_bytes(content)
        (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
        with pytest.raises(SmeltError, match=r"manifest\.json: (not JSON|artefact format None)"):
            artefact.load(folder)


def test_a_program_that_calls_something_else_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.smelt")
    text = (folder / "program.txt").read_text()
    assert "smelt.linear" in text
    for wrong in ("os.system", "aten.from_file.default", "smelt.run"):
        rehashed(folder, "program.txt", text.replace("smelt.linear", wrong).encode())
        with pytest.raises(SmeltError):
            artefact.load(folder)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a.smelt")
    whole = (folder / "weights.safetensors").read_bytes()
    for wrong in (b"", whole[:40], b"\x80\x04K\x01.", (1 << 40).to_bytes(8, "little") + whole[8:]):
        with pytest.raises(SmeltError, match=r"weights\.safetensors"):
            artefact.load(rehashed(folder, "weights.safetensors", wrong))


def test_what_stands_there_already(tmp_path: Path) -> None:
    """An artefact is replaced, an empty folder filled; anything else is left alone."""
    folder = written(tmp_path / "deep" / "er" / "a.smelt")
    written(folder, captured("gpt2"))
    assert artefact.load(folder)[0].name == "gpt2"
    (tmp_path / "empty").mkdir()
    artefact.load(written(tmp_path / "empty"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(SmeltError, match=f"{name}: exists and is not a smelt artefact; choose another folder"):
            written(tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "link").symlink_to(folder)
    assert artefact.load(written(tmp_path / "link"))[0].name == "layer"
    assert artefact.load(folder)[0].name == "layer" and (tmp_path / "link").is_symlink()
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SmeltError, match=r"file/a\.smelt: cannot be written \("):
        written(tmp_path / "file" / "a.smelt")


FAULTS = {
    "the first file": ("smelt.runtime.artefact.save_file", 1),
    "a hash": ("smelt.runtime.artefact.sha256", 2),
    "writing to the disk": ("os.fsync", 3),
    "moving the old one away": ("pathlib.Path.rename", 1),
    "moving the new one there": ("pathlib.Path.rename", 2),
}


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError()], ids=repr
)
@pytest.mark.parametrize(("function", "time"), FAULTS.values(), ids=FAULTS)
def test_a_failure_in_the_middle_leaves_what_was_there(
    function: str, time: int, fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "a.smelt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    place, name = function.rsplit(".", 1)
    right, calls = getattr(pkgutil.resolve_name(place), name), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == time:
            raise fault
        return right(*args, **options)

    monkeypatch.setattr(function, failing)
    for target in (folder, tmp_path / "fresh.smelt"):
        if target != folder and name == "rename":
            continue  # one move, which the system makes at once
        calls.clear()
        with pytest.raises(SmeltError if isinstance(fault, OSError) else type(fault)):
            written(target, captured("gpt2"))
        assert [path.name for path in tmp_path.iterdir()] == ["a.smelt"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    artefact.load(folder)


def test_weights_stay_in_their_file_but_for_one_packed_copy() -> None:
    """After loading and generating, products hold their weights once, packed, and nothing else of the file is held."""
    compiled = smelt.load(tiny.artefact())
    assert all(isinstance(weight.parts, Mapped) for weight in compiled.program.weights.values())
    compiled.generate([1, 2, 3], max_new_tokens=2)
    kernels = [kernel for _, kernel in compiled.plan.regions if isinstance(kernel, ProductKernel)]
    packed = [(kernel._weight(node), parts) for kernel in kernels for node, parts in kernel._packed.items()]
    assert len(packed) == 15
    for weight, parts in packed:
        held = sum(part.numel() * part.element_size() for part in parts)
        assert weight.nbytes <= held <= 1.01 * weight.nbytes
        assert not any(lies_in(part, "weights.safetensors") for part in parts)


def lies_in(tensor: torch.Tensor, name: str) -> bool:
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= at < last:
            return rest[-1].endswith(name)
    return False


def test_loading_needs_neither_transformers_nor_the_models_code(tmp_path: Path) -> None:
    folder = tmp_path / "moved.smelt"
    shutil.copytree(tiny.artefact(), folder)
    script = """
import sys
sys.modules["transformers"] = None
import smelt
lm = smelt.load(sys.argv[1])
print(lm.generate([5, 6, 7], max_new_tokens=4))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    wanted = smelt.compile(tiny.model(), "none").generate([5, 6, 7], max_new_tokens=4)
    assert json.loads(done.stdout) == wanted


def environment() -> dict[str, str]:
    source = Path(smelt.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(source)}


def test_a_tensor_digest_follows_values_and_nothing_else() -> None:
    x = torch.arange(12).view(3, 4)
    assert artefact.tensor_digest(x) == artefact.tensor_digest(x.t().contiguous().t())
    assert artefact.tensor_digest(x) != artefact.tensor_digest(x + 1)
    assert len(artefact.tensor_digest(torch.zeros(0, dtype=torch.int64))) == 64
