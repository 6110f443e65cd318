"""Captures Hugging Face models through transformers' own attention, mask and experts interfaces.

The model is built on the meta device, exported once with dynamic batch and length and no cache, and its weights stay in
their files. What comes out is checked against transformers' eager forward before anyone may use it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ..errors import SmeltError
from ..ops import ATTENTION, arguments
from ..program import Program
from ..raising import raise_program
from ..weight import Weight
from .check import check_against_source
from .constructs import refuse_unknown, suspect
from .exported import ExportError, evaluating, export, to_program
from .folder import empty_model
from .interfaces import NAME, chosen, register
from .names import Checkpoint, all_tensors, tied_names

_LONGEST = 1 << 20
_MOST_TRACED = 8  # models whose trace is kept: a few megabytes each
_traced: dict[tuple[type, str], torch.export.ExportedProgram] = {}


def capture_hf(source: str | Path | nn.Module) -> Program:
    """A Program of a transformers model given by folder, hub id or object.

    Decoders: inputs tokens and positions int64 [B, T], output logits [B, T, V]. Encoders: inputs tokens and mask
    [B, T], output hidden [B, T, K]. Raises SmeltError naming the construct that cannot be captured.
    """
    register()
    model, folder = (source, None) if isinstance(source, nn.Module) else empty_model(Path(source))
    config: Any = model.config
    name = str(config.model_type)
    refuse_unknown(model, name)
    weights, weight = _weights(model, folder)
    decoder = bool(model.can_generate())  # type: ignore[operator]  # a method of every transformers model
    inputs, outputs = (("tokens", "positions"), ("logits",)) if decoder else (("tokens", "mask"), ("hidden",))
    with evaluating(model):
        exported = _export(model, decoder, name) if folder is None else _remembered(model, decoder, name)
        program = to_program(exported, name, inputs, outputs, weight, tied_names(model))
        program.facts = _facts(config, decoder, folder)
        through_interface = set(program.calls(ATTENTION))
        raise_program(program)
        open_ended = [node for node in program.calls(ATTENTION) if not arguments(node)["causal"]]
        if decoder and not through_interface.issuperset(open_ended):  # its mask was not asked for, and is missing
            raise SmeltError(f"{name}: cannot be captured; {suspect(model)}")
        if decoder and open_ended:
            raise SmeltError(
                f"{name}: its attention looks both ways (is_decoder is false), so it cannot generate; "
                "load it without its language-model head, as an encoder"
            )
        check_against_source(program, model, weights, decoder)
    return program


def _weights(model: Any, folder: Path | None) -> tuple[Mapping[str, Weight], Callable[[str], Weight]]:
    """The stored weights by name, and a look-up that also knows tables made from the configuration."""
    if folder is None:
        tensors = all_tensors(model)
        strange = next((n for n, t in tensors.items() if t.device.type != "cpu"), None)
        if strange is not None:
            where = tensors[strange].device
            raise SmeltError(
                f"{model.config.model_type}: '{strange}' is on the device {where}; capture needs it on the CPU"
            )
        weights = {n: Weight.of(t) for n, t in tensors.items()}
        return weights, weights.__getitem__
    checkpoint, stored = Checkpoint(model, folder), model.state_dict()
    computed = {n: Weight.of(b) for n, b in model.named_buffers() if n not in stored}
    return checkpoint.weights, lambda name: computed[name] if name in computed else checkpoint(name)


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return logits


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden


def _remembered(model: Any, decoder: bool, name: str) -> torch.export.ExportedProgram:
    """The trace of a model that was built from its configuration, which says all of it: made once a process.

    What becomes of it is checked against the model as ever.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    key = type(model), json.dumps(config, sort_keys=True, default=str)
    if key not in _traced:
        while len(_traced) >= _MOST_TRACED:
            del _traced[next(iter(_traced))]
        _traced[key] = _export(model, decoder, name)
    return _traced[key]


def _export(model: nn.Module, decoder: bool, name: str) -> torch.export.ExportedProgram:
    longest = _LONGEST if decoder else int(getattr(model.config, "max_position_embeddings", _LONGEST))
    shape = {0: Dim("B", min=1, max=4096), 1: Dim("T", min=1, max=longest)}
    tokens = torch.ones(2, 7, dtype=torch.int64, device="meta")
    wrapped = _Decoder(model) if decoder else _Encoder(model)
    try:
        with _on_meta(model), chosen(model, NAME):
            return export(wrapped, (tokens, tokens.clone()), (shape, dict(shape)), name)
    except ExportError as fault:
        raise SmeltError(f"{fault}; {suspect(model)}") from fault


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """The model with every tensor on the meta device and every float in float32; restored on exit."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    swapped: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                kept.append((table, key, tensor))
                if id(tensor) not in swapped:
                    wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty_like(tensor, device="meta", dtype=wide)
                    swapped[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
                table[key] = swapped[id(tensor)]  # type: ignore[assignment]  # tensors in both tables
    try:
        yield
    finally:
        for table, key, tensor in kept:
            table[key] = tensor


def _facts(config: Any, decoder: bool, folder: Path | None) -> dict[str, Any]:
    text = config.get_text_config(decoder=True) if decoder else config
    eos = getattr(text, "eos_token_id", None)
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "seq_length")
    context = next((c for name in names if (c := getattr(text, name, None))), None)
    return {
        "kind": "decoder" if decoder else "encoder",
        "family": config.model_type,
        "vocabulary": int(text.vocab_size),
        "context": int(context) if context else None,
        "eos": [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)],
        "hidden": int(text.hidden_size),
        "source": folder.name if folder is not None else type(config).__name__,
    }
