"""The artefact: a folder with a program as text, its weights as safetensors, a tokenizer and a manifest of hashes.

Nothing in it is executed or unpickled: the program is parsed against a fixed table of ops, weights are mapped. Every
byte is under a hash. A folder appears whole or not at all: it is written beside its place and moved there.
Of weights that stand upon those of a base, it holds what they add, and the hash of what they stand upon.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..ir.encoding import parse as parse_encoding
from ..ir.errors import SmeltError
from ..ir.folders import sha256, whole
from ..ir.program import Program
from ..ir.text import parse_program, print_program
from ..ir.weight import Mapped, Upon, Weight
from . import huffman

FORMAT = 1
MANIFEST, SEAL, PROGRAM, WEIGHTS = "manifest.json", "manifest.sha256", "program.txt", "weights.safetensors"
TABLES = "cache.safetensors"  # calibrated tables of the cache's encodings
DRAFTS = "decode.safetensors"  # tables of drafters
CHOICES = "choice.safetensors"  # tables of searches
DIGITS = 12  # of a hash that are shown
DRAFT = "draft."  # begins the names of a draft model's files
DISK = "disk"  # of the manifest: how files lie that are coded


def save(
    folder: Path, program: Program, assets: Mapping[str, bytes], facts: Mapping[str, Any], coded: bool = False
) -> None:
    """Write `folder`; `assets` are further files (the tokenizer's), `facts` go into the manifest as they are.

    coded: tensors lie in Huffman codes, which `load` decodes to the same bits; program and weights are the same.
    An artefact that stands there is replaced, and stays as it was if anything fails. Raises SmeltError where something
    else stands there, or the file system refuses.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SmeltError(f"{folder}: exists and is not a smelt artefact; choose another folder")
    with whole(folder) as draft:
        _write(draft, program, assets, facts, coded)


def load(folder: Path, base: Program | None = None) -> tuple[Program, dict[str, Any]]:
    """The program, its weights mapped from the folder, and the manifest. Every file is checked against its hash.

    Weights that are coded on disk are decoded into memory.

    base: the program upon whose weights those of the artefact stand, if they do.
    Raises SmeltError naming the file that is missing, altered, of another format, or not listed, and for a base that is
    missing or another.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        path = folder / name
        if Path(name).name != name:
            raise SmeltError(f"{folder / MANIFEST}: lists the file '{name}', which lies outside of the artefact")
        if not path.is_file():
            raise SmeltError(f"{path}: the artefact is incomplete, this file is missing; compile or copy it again")
    with ThreadPoolExecutor(1) as aside:  # the weights take longer to hash than the program to read
        weights = aside.submit(_check, folder, manifest, WEIGHTS)
        for name in sorted(manifest["files"].keys() - {WEIGHTS}):
            _check(folder, manifest, name)
        try:
            program = _read(folder, manifest, base)
        finally:
            weights.result()  # damaged weights are called so, whatever else they made fail
    return program, manifest


def _check(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    if sha256(folder / name) != manifest["files"][name]:
        raise SmeltError(
            f"{folder / name}: content does not match its hash in {MANIFEST}; the file was altered or damaged"
        )


def _check_base(folder: Path, manifest: Mapping[str, Any], base: Program | None) -> None:
    told = manifest.get("base")
    if told is None:
        if base is not None:
            raise SmeltError(f"{folder}: stands upon no base; leave it out")
        return
    wanted = f"{told['name']}, whose weights hash to {told['digest'][:DIGITS]}"
    if base is None:
        raise SmeltError(f"{folder}: holds only what its model adds to {wanted}; name that model with base= or --base")
    names = _upon(manifest[key] for key in ("weights", "draft") if key in manifest)
    lacking = sorted(names - base.weights.keys())
    digest = "" if lacking else _digest(base, names)
    if digest != told["digest"]:
        found = f"has no {lacking[0]}" if lacking else f"hashes to {digest[:DIGITS]}"
        raise SmeltError(f"{folder}: stands upon {wanted}, but the base given is {base.name}, which {found}")


def _upon(tables: Iterable[Mapping[str, Any]]) -> set[str]:
    """The weights of the base that the manifest's tables name."""
    return {entry["upon"] for table in tables for entry in table.values() if "upon" in entry}


def _digest(base: Program, names: Collection[str]) -> str:
    """A hash of these weights of a base, as they are stored."""
    return hashlib.sha256("".join(f"{n} {base.weights[n].digest()}\n" for n in sorted(names)).encode()).hexdigest()


def _read(folder: Path, manifest: Mapping[str, Any], base: Program | None) -> Program:
    for path in sorted(folder.glob("*.json")):  # a tokenizer would read it
        if path.name not in {MANIFEST, *manifest["files"]}:
            raise SmeltError(f"{path}: not a file of the artefact, which is sealed; remove it")
    try:
        _check_base(folder, manifest, base)
        weights = _weights(folder, manifest, "", {}, base)
        drafting = _weights(folder, manifest, DRAFT, weights, base) if "draft" in manifest else None
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise SmeltError(f"{folder / MANIFEST}: its table of weights cannot be read ({fault!r})") from fault
    program = _program(folder, manifest, weights, "")
    program.base = base
    if drafting is not None:
        program.draft = _program(folder, manifest, drafting, DRAFT)
    return program


def _program(folder: Path, manifest: Mapping[str, Any], weights: Mapping[str, Weight], lead: str) -> Program:
    """The program whose files begin with `lead`."""
    program = parse_program((folder / f"{lead}{PROGRAM}").read_text(encoding="utf-8"), weights, sealed=True)
    if (name := lead + TABLES) in manifest["files"]:
        if program.cache is None:
            raise SmeltError(f"{folder / name}: holds tables of a cache that the program does not have")
        program.cache = program.cache.with_tables(_tables(folder, manifest, name))
    if (name := lead + DRAFTS) in manifest["files"]:
        if program.decode is None:
            raise SmeltError(f"{folder / name}: holds tables of a drafter that the program does not have")
        program.decode = program.decode.with_tables(_tables(folder, manifest, name))
    if (name := lead + CHOICES) in manifest["files"]:
        if program.choice is None:
            raise SmeltError(f"{folder / name}: holds tables of a search that the program does not have")
        program.choice = program.choice.with_tables(_tables(folder, manifest, name))
    return program


def _tables(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    told = _coded(manifest, name)
    return huffman.decode(folder / name, told, huffman.entries(folder / name, told))


def _coded(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """How a file's tensors are coded, if they are."""
    told: Mapping[str, Any] | None = manifest.get(DISK, {}).get(name)
    return told


def certify(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Put a certificate into an artefact's manifest, in place of an older one; all else stays as it is.

    Raises SmeltError where the artefact cannot be written, which then is as it was.
    """
    folder = Path(folder).resolve()
    manifest = {**read_manifest(folder), "certificate": dict(certificate)}
    with whole(folder) as draft:
        for name in manifest["files"]:
            os.link(folder / name, draft / name)
        _seal(draft, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest; its own hash and its format are checked, those of the files are not."""
    path = folder / MANIFEST
    if not path.is_file() or not (folder / SEAL).is_file():
        raise SmeltError(f"{folder}: not a smelt artefact (no {MANIFEST} and {SEAL}), or one that was half copied")
    if sha256(path).encode() != (folder / SEAL).read_bytes():
        raise SmeltError(f"{path}: content does not match {SEAL}; the file was altered or damaged")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise SmeltError(f"{path}: not JSON ({fault})") from fault
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise SmeltError(
            f"{path}: artefact format {found}, this smelt reads format {FORMAT}; "
            "update smelt, or compile the artefact again with this version"
        )
    tables = [manifest.get(key, {}) for key in ("files", "weights", "draft", DISK)]
    if not all(isinstance(table, dict) for table in tables) or not {PROGRAM, WEIGHTS} <= manifest["files"].keys():
        raise SmeltError(f"{path}: does not list {PROGRAM} and {WEIGHTS}; compile the artefact again")
    return manifest


def plain_hash(manifest: Mapping[str, Any], name: str) -> str:
    """The hash of a file's content, as it was before it was coded."""
    told = _coded(manifest, name)
    return str(manifest["files"][name] if told is None else told["plain"])


def tensor_digest(tensor: torch.Tensor) -> str:
    """A content hash of a tensor, such as the calibration tokens."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _write(folder: Path, program: Program, assets: Mapping[str, bytes], facts: Mapping[str, Any], coded: bool) -> None:
    _write_program(folder, program, "", {})
    tables = {"weights": _table(program, {})}
    if program.draft is not None:
        shared = {id(weight): name for name, weight in program.weights.items()}
        _write_program(folder, program.draft, DRAFT, shared)
        tables["draft"] = _table(program.draft, shared)
    if coded:
        facts = {**facts, DISK: {path.name: huffman.shrink(path) for path in sorted(folder.glob("*.safetensors"))}}
    for name, content in assets.items():
        (folder / name).write_bytes(content)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    names = _upon(tables.values())
    if names and program.base is not None:
        facts = {**facts, "base": {"name": program.base.name, "digest": _digest(program.base, names)}}
    _seal(folder, {**facts, "format": FORMAT, **tables, "files": files})


def _seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    (folder / SEAL).write_text(sha256(folder / MANIFEST))


def _write_program(folder: Path, program: Program, lead: str, shared: Mapping[int, str]) -> None:
    """A program's files, whose names begin with `lead`; weights that are `shared` stand elsewhere."""
    save_file(_tensors({n: w for n, w in program.weights.items() if id(w) not in shared}), folder / f"{lead}{WEIGHTS}")
    if program.cache is not None and program.cache.tables:
        save_file(dict(program.cache.tables), folder / f"{lead}{TABLES}")
    if program.decode is not None and program.decode.tables:
        save_file(dict(program.decode.tables), folder / f"{lead}{DRAFTS}")
    if program.choice is not None and program.choice.tables:
        save_file(dict(program.choice.tables), folder / f"{lead}{CHOICES}")
    (folder / f"{lead}{PROGRAM}").write_text(print_program(program), encoding="utf-8")


def _table(program: Program, shared: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """What the manifest says of weights.

    `of` names the weight of the model itself that a draft model shares, `upon` that of the base, which is not written.
    """
    return {
        name: {"of": shared[id(w)]}
        if id(w) in shared
        else {"shape": list(w.shape), "encoding": w.encoding.spec(), "parts": sorted(w.own)}
        | ({"upon": w.parts.name} if isinstance(w.parts, Upon) else {})
        for name, w in program.weights.items()
    }


def _tensors(weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """The parts of all weights by `weight/part`, each in memory of its own, as safetensors wants them."""
    out: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, weight in weights.items():
        for part, value in weight.own.items():
            tensor = value.detach().contiguous()
            at = tensor.untyped_storage().data_ptr()
            out[f"{name}/{part}"] = tensor.clone() if at in taken else tensor
            taken.add(at)
    return out


def _weights(
    folder: Path, manifest: Mapping[str, Any], lead: str, shared: Mapping[str, Weight], base: Program | None
) -> dict[str, Weight]:
    """The weights that the manifest lists for the program whose files begin with `lead`, mapped or decoded.

    Each must have the bits of its shape and encoding, and none is read before all have.
    """
    path, table = folder / f"{lead}{WEIGHTS}", manifest["draft" if lead else "weights"]
    told = _coded(manifest, path.name)
    stored = huffman.entries(path, told)
    weights: dict[str, Weight] = {}
    decoded: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in table.items():
        if "of" in entry:
            weights[name] = shared[entry["of"]]
            continue
        keys = {part: (path, f"{name}/{part}") for part in entry["parts"]}
        if missing := [key for _, key in keys.values() if key not in stored]:
            raise SmeltError(f"{path}: has no tensor '{missing[0]}'")
        parts: Mapping[str, torch.Tensor] = Mapped(keys) if told is None else decoded.setdefault(name, {})
        if base is not None and "upon" in entry:
            parts = Upon(entry["upon"], base.weights[entry["upon"]], parts)
        weight = Weight(tuple(map(int, entry["shape"])), parse_encoding(entry["encoding"]), parts)
        held = [stored[key] for _, key in keys.values()]
        bits = 8 * sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in held)
        if bits != weight.bits:
            raise SmeltError(
                f"{path}: '{name}' has {bits} bits, {weight.encoding} of shape {list(weight.shape)} {weight.bits}"
            )
        weights[name] = weight
    wanted = {(name, part): f"{name}/{part}" for name in decoded for part in table[name]["parts"]}
    tensors = huffman.decode(path, told, wanted.values())
    for (name, part), key in wanted.items():
        decoded[name][part] = tensors[key]
    return weights
