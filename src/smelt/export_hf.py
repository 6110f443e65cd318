"""export_hf: writes a compiled model as the folder that transformers and vLLM load, its matrices still quantized."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .assets import CONFIG
from .codegen.onnx.write import MANIFEST, check_place
from .ir.capture.folder import empty_model
from .ir.capture.interfaces import chosen
from .ir.capture.names import tied_names
from .ir.capture.streamed import streamed
from .ir.capture.variants import relative_error
from .ir.encoding import Dense
from .ir.errors import SmeltError
from .ir.folders import sha256, whole
from .ir.interpret import interpret
from .ir.ops import EMBEDDING, HEAD, LINEAR, QUANTIZED, arguments, is_op
from .ir.program import Program
from .packed import Scheme, configuration, pack, scheme

WEIGHTS = "model.safetensors"
BAR = 1e-4  # relative to the largest output, float32: both sides multiply the same decoded matrices
PLANS = ("cache", "decode", "choice", "depth", "draft")


@dataclass(frozen=True)
class HFExport:
    """What was written: bytes of all files, matrices by how they are stored, remarks.

    error: how far transformers' model of the configuration is off with these weights; None if it was not asked.
    """

    folder: Path
    nbytes: int
    matrices: Mapping[Scheme, int]
    error: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Size, matrices, check and remarks, a line each."""
        lines = [f"{self.folder}: {self.nbytes / 1e6:.1f} MB"]
        for kind, count in sorted(self.matrices.items()):
            shared = f"group of {kind.group}" if kind.group else "row"
            lines.append(f"{count} matrices of {kind.bits} bits, a scale a {shared}")
        lines.append("not checked" if self.error is None else f"checked in transformers: error {self.error:.1e}")
        return "\n".join([*lines, *self.notes])


@dataclass
class _Parted:
    """The weights by what becomes of them."""

    packed: dict[str, Scheme] = field(default_factory=dict)
    decoded: dict[str, list[str]] = field(default_factory=dict)  # by the reason
    dense: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_hf(
    program: Program,
    folder: str | Path,
    *,
    assets: Mapping[str, bytes],
    facts: Mapping[str, Any] | None = None,
    check: bool = True,
    allow_decoded: bool = False,
) -> HFExport:
    """Write `folder`, which appears whole or not at all; an export that stands there is replaced.

    assets: config.json, the tokenizer's files. facts: go into the manifest. check: transformers' model of the
    configuration must compute with these weights what the program does. allow_decoded: what the layout of
    compressed-tensors cannot say is written dense instead of refused. Raises SmeltError naming the weight at fault.
    """
    folder = Path(folder)
    check_place(folder)
    plain = _weights_alone(program)
    with whole(folder.resolve()) as draft:
        model, config = _model(draft, plain, assets)
        parted = _part(plain, model, str(config["dtype"]), allow_decoded)
        error = _difference(plain, model) if check else None
        save_file(_tensors(plain, parted, str(config["dtype"])), draft / WEIGHTS, metadata={"format": "pt"})
        if parted.packed:
            products = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            config["quantization_config"] = configuration(parted.packed, products)
        (draft / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name in assets.keys() - {CONFIG}:
            (draft / name).write_bytes(assets[name])
        notes = [*_left_out(program), *parted.notes]
        files = {path.name: sha256(path) for path in sorted(draft.iterdir())}
        told = {**(facts or {}), "error": error, "notes": notes, "files": files}
        (draft / MANIFEST).write_text(json.dumps(told, indent=1), encoding="utf-8")
        size = sum(path.stat().st_size for path in draft.iterdir())
    kinds = list(parted.packed.values())
    return HFExport(folder, size, {kind: kinds.count(kind) for kind in kinds}, error, tuple(notes))


def _weights_alone(program: Program) -> Program:
    """The program without the rounding of activations, which a layout of weights does not say."""
    plain = program.fork()
    for node in plain.calls(QUANTIZED):
        node.replace_all_uses_with(arguments(node)["x"])
    plain.prune()
    return plain


def _model(draft: Path, program: Program, assets: Mapping[str, bytes]) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' model without its tensors, and its configuration: a head with a weight of its own is untied."""
    if importlib.util.find_spec("transformers") is None:
        raise SmeltError("export to a folder of transformers needs it: pip install 'smelt[hf]'")
    if CONFIG not in assets:
        raise SmeltError(
            f"{program.name}: was compiled without a {CONFIG}, which the export continues; export from the compile of "
            "a model folder or hub id"
        )
    (draft / CONFIG).write_bytes(assets[CONFIG])
    model, _ = empty_model(draft)
    config: dict[str, Any] = json.loads(assets[CONFIG])
    if any(first != name and name in program.weights for name, first in tied_names(model).items()):
        config["tie_word_embeddings"] = False
        (draft / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        model, _ = empty_model(draft)
    config.setdefault("dtype", config.get("torch_dtype") or "float32")
    return model, config


def _part(program: Program, model: nn.Module, dtype: str, allow_decoded: bool) -> _Parted:
    """What becomes of each weight; SmeltError for what the model or the layout has no place for."""
    wanted, first, parted = model.state_dict(), tied_names(model), _Parted()
    for name, weight in program.weights.items():
        since = program.changed_by(name)
        if name not in wanted:
            if name in first:  # a table that the configuration gives
                continue
            raise SmeltError(
                f"{program.name}: '{name}'{since} is not one of the tensors of {type(model).__name__}, and the export "
                "keeps those; compile without the step that made it, or export to onnx"
            )
        if weight.shape != tuple(wanted[name].shape):
            raise SmeltError(
                f"{program.name}: '{name}' has the shape {list(weight.shape)}{since}, but {CONFIG} asks for "
                f"{list(wanted[name].shape)}, and the export keeps its sizes; compile without that step"
            )
        if isinstance(weight.encoding, Dense):
            parted.dense.append(name)
            continue
        kind = scheme(weight) if _is_product(program, model, name) else "is not the matrix of one linear layer"
        if isinstance(kind, Scheme):
            parted.packed[name] = kind
            continue
        lookup = any(is_op(user, EMBEDDING) for user in program.uses(name))
        if not (lookup or allow_decoded):
            raise SmeltError(
                f"{program.name}: '{name}'{since} {kind}; allow_decoded=True (--allow-decoded) writes it as {dtype}"
            )
        why = "the layout has no lookup tables" if lookup else f"it {kind}"
        parted.decoded.setdefault(why, []).append(name)
    missing = [name for name in wanted if first[name] not in program.weights]
    if missing and program.facts.get("kind") == "decoder":
        raise SmeltError(
            f"{program.name}: '{missing[0]}' is gone, but {CONFIG} asks for it; compile without the step that drops it"
        )
    for why, names in parted.decoded.items():
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        parted.notes.append(f"{names[0]}{more} written as {dtype}: {why}")
    parted.notes += [f"{name} is left out: the compiled outputs do not read it" for name in missing]
    parted.packed = _agreed(program, parted.packed)
    parted.notes += _warnings(program, parted, dtype)
    return parted


def _is_product(program: Program, model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    alone = all(is_op(user, LINEAR) or is_op(user, HEAD) for user in program.uses(name))
    return alone and isinstance(module, nn.Linear) and name.endswith(".weight")


def _agreed(program: Program, packed: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Matrices of one input in the groups of the finest: vLLM stacks them (query, key and value; gate and up)."""
    beside: dict[Any, list[str]] = {}
    for node in program.calls(LINEAR):
        name = str(arguments(node)["weight"].target)
        if name in packed:
            beside.setdefault((arguments(node)["x"], packed[name].bits), []).append(name)
    agreed = dict(packed)
    for (_, bits), names in beside.items():
        group = math.gcd(*(packed[name].group for name in names))  # a whole row counts as 0, which every group divides
        agreed |= {name: Scheme(bits, group) for name in names}
    return agreed


def _warnings(program: Program, parted: _Parted, dtype: str) -> list[str]:
    said = []
    scales = {program.weights[name].parts["scale"].dtype for name in parted.packed}
    computed = getattr(torch, dtype)
    for scale in scales:
        if torch.promote_types(scale, computed) != computed:
            told = str(scale).removeprefix("torch.")
            said.append(f"scales are {told} and {CONFIG} says {dtype}, to which readers round them: set scale: {dtype}")
    bits = {kind.bits for kind in parted.packed.values()}
    if 3 in bits:
        said.append("3 bits are packed without gaps, as in compressed-tensors since the middle of 2026, not before")
    if bits - {4, 8}:
        said.append("older versions of vLLM have kernels for 4 and 8 bits alone")
    return said


def _left_out(program: Program) -> list[str]:
    plans = [name for name in PLANS if getattr(program, name) is not None]
    said = [f"left out, as the folder holds weights alone: {', '.join(plans)}"] if plans else []
    return said + ["activations are not rounded there"] * any(program.calls(QUANTIZED))


def _tensors(program: Program, parted: _Parted, dtype: str) -> dict[str, torch.Tensor]:
    """Every tensor by its name in the file, each in memory of its own, as safetensors wants them."""
    made: dict[str, torch.Tensor] = {}
    for name, kind in parted.packed.items():
        module = name.removesuffix("weight")
        made |= {module + part: value for part, value in pack(program.weights[name], kind).items()}
    for name in chain(*parted.decoded.values()):
        made[name] = program.weights[name].dense(getattr(torch, dtype))
    taken: set[int] = set()
    for name in parted.dense:
        value = program.weights[name].parts["data"].detach().contiguous()
        at = value.untyped_storage().data_ptr()
        made[name] = value.clone() if at in taken else value
        taken.add(at)
    return made


def _difference(program: Program, model: nn.Module) -> float:
    """How far transformers' model with these weights is off; SmeltError if it computes something else."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(program.facts["vocabulary"]), (2, 24), generator=random)
    decoder = program.facts.get("kind") == "decoder"
    places = torch.arange(tokens.shape[1]).expand_as(tokens) if decoder else torch.ones_like(tokens)
    ours, theirs = ("positions", "position_ids") if decoder else ("mask", "attention_mask")
    output, read = ("logits", "logits") if decoder else ("hidden", "last_hidden_state")
    options = {"use_cache": False} if decoder else {}
    with torch.no_grad(), chosen(model, "eager"), streamed(model, program.weights):
        expected = interpret(program, {"tokens": tokens, ours: places})[output]
        found = model(input_ids=tokens, **{theirs: places}, **options)[read]
    error = relative_error(found, expected)
    if not error <= BAR:
        steps = ", ".join(record.name for record in program.history)
        raise SmeltError(
            f"{program.name}: transformers' {type(model).__name__} computes something else with these weights (error "
            f"{error:.1e}, allowed {BAR:.0e}): {CONFIG} cannot say what one of these steps did, "
            f"so leave it out: {steps}"
        )
    return error
