"""Language models among ONNX files: their inputs, what they count positions with, and what their masks mean.

A decoder is captured as if it saw a whole text at once: nothing is cached before it, every token is real. The graphs
that files compute masks with are told apart by their values, not by their nodes: a mask that equals a causal one for
several lengths becomes the attribute of attention, and what equals 0, 1, 2, … becomes the input `positions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...ops import ATTENTION, EMBEDDING, arguments
from ...program import Program
from .beside import beside
from .graph import Node, Port
from .known import Known, as_tensor
from .load import Model
from .masks import masks_of
from .module import OnnxModule
from .registry import MICROSOFT
from .trace import Feed

aten = torch.ops.aten
_VIEWS = {aten.reshape.default, aten.view.default, aten.to.dtype, aten._to_copy.default, aten.unsqueeze.default}
_PAST = re.compile(r"past|cache", re.IGNORECASE)
_PRESENT = re.compile(r"present|cache|past", re.IGNORECASE)
POSITIONS = "smelt::positions"
_PLACE = 9  # of position_ids among the inputs of GroupQueryAttention
SYMBOLS = (Feed("tokens", torch.int64, ("B", "T")), Feed("positions", torch.int64, ("B", "T")))


@dataclass(frozen=True)
class Decoder:
    """Which input of the file plays which part, by index."""

    tokens: int
    mask: int | None
    positions: int | None
    past: tuple[int, ...]
    switches: tuple[int, ...]  # booleans that say whether there is a past
    logits: int
    ports: tuple[Port, ...]

    def arrange(self, tokens: torch.Tensor, positions: torch.Tensor) -> list[Any]:
        """The file's inputs for a text without a past."""
        given: list[Any] = [None] * len(self.ports)
        given[self.tokens] = tokens.to(_integer(self.ports[self.tokens]))
        if self.mask is not None:
            given[self.mask] = torch.ones_like(tokens, dtype=_integer(self.ports[self.mask]))
        if self.positions is not None:
            given[self.positions] = positions.to(_integer(self.ports[self.positions]))
        for i in self.past:
            given[i] = self._empty(i, tokens)
        for i in self.switches:
            given[i] = Known.of([False], torch.bool)
        return given

    def _empty(self, index: int, tokens: torch.Tensor) -> torch.Tensor:
        """[B, G, 0, D], or [2, B, G, 0, D] for keys and values together; a size that the file leaves open is 1."""
        shape = [d if isinstance(d, int) else 1 for d in self.ports[index].shape or ()]
        lead: list[Any] = [2] if len(shape) == 5 else []
        return torch.zeros([*lead, tokens.shape[0], shape[-3], 0, shape[-1]])


def _integer(port: Port) -> torch.dtype:
    return torch.int32 if port.kind == 6 else torch.int64


def find_decoder(model: Model) -> Decoder | None:
    """The parts of a language model, by type, rank and name; None for any other graph."""
    ports, outputs = model.graph.inputs, model.graph.outputs
    found: dict[str, int] = {}
    past, switches = [], []
    for i, port in enumerate(ports):
        rank, name = len(port.shape) if port.shape is not None else -1, port.name.lower()
        whole = port.kind in (6, 7)
        if whole and rank == 2 and "mask" in name:
            found["mask"] = i
        elif whole and rank == 2 and "position" in name:
            found["positions"] = i
        elif whole and rank == 2 and ("ids" in name or "token" in name or len(ports) == 1) and "type" not in name:
            found["tokens"] = i
        elif not whole and port.kind != 9 and rank in (4, 5) and _PAST.search(name):
            past.append(i)
        elif port.kind == 9 and "cache" in name:
            switches.append(i)
        else:
            return None
    results = [i for i, port in enumerate(outputs) if not _PRESENT.search(port.name)]
    if "tokens" not in found or len(results) != 1:
        return None
    if outputs[results[0]].shape is not None and len(outputs[results[0]].shape or ()) != 3:
        return None
    return Decoder(
        found["tokens"], found.get("mask"), found.get("positions"), tuple(past), tuple(switches), results[0], ports
    )


def with_positions(model: Model) -> Model:
    """The model with POSITIONS as an input of each attention that counts positions by itself."""

    def given(node: Node) -> Node:
        counts = (node.domain, node.op) == (MICROSOFT, "GroupQueryAttention") and node.attributes.get("do_rotary", 0)
        if not counts or (len(node.inputs) > _PLACE and node.inputs[_PLACE]):
            return node
        inputs = [*node.inputs, *[""] * (_PLACE + 1 - len(node.inputs))]
        inputs[_PLACE] = POSITIONS
        return replace(node, inputs=tuple(inputs))

    return replace(model, graph=replace(model.graph, nodes=tuple(map(given, model.graph.nodes))))


def counted(module: OnnxModule, decoder: Decoder) -> tuple[str, ...]:
    """Values of the file that count tokens, 0, 1, 2, … in each row [1, T] or [B, T], whatever the tokens are."""
    found: set[str] | None = None
    for batch, length in ((2, 5), (3, 7)):
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        positions = torch.arange(length).expand(batch, -1)
        meant, seen = positions[:1], set[str]()

        def watch(name: str, value: Any, meant: torch.Tensor = meant, seen: set[str] = seen) -> None:
            value = as_tensor(value)
            if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype is torch.bool:
                return
            if value.dim() == 2 and value.shape[1] == meant.shape[1] and bool((value == meant).all()):
                seen.add(name)

        module.watch, module.doubting = watch, True
        module.added = {POSITIONS: positions}
        try:
            module(*decoder.arrange(tokens, positions))
        finally:
            module.watch, module.doubting = None, False
        found = seen if found is None else found & seen
    return tuple(sorted(found or ()))


def settle_masks(program: Program, where: str) -> str | None:
    """Causality and windows of masks become attributes of attention; returns why some mask is neither, or None."""
    masked = [node for node in program.calls(ATTENTION) if arguments(node)["mask"] is not None]
    masks = list(dict.fromkeys(arguments(node)["mask"] for node in masked))
    if not masks:
        return None
    meanings = masks_of(program, masks)
    for node in masked:
        meaning = meanings[arguments(node)["mask"]]
        a = arguments(node)
        if isinstance(meaning, str):
            return f"the mask '{a['mask'].name}' of {node.name} {meaning}"
        causal, window = meaning
        a["mask"] = None
        if causal:
            narrow = [w for w in (a["window"], window) if w is not None]
            a["causal"], a["window"] = True, min(narrow) if narrow else None
        node.args, node.kwargs = tuple(a[name] for name in ATTENTION.arguments), {}
    program.prune()
    return None


def facts(program: Program, model: Model, decoder: Decoder, tables: Mapping[str, int]) -> dict[str, Any]:
    """What generation needs to know, from the graph and the files beside it."""
    told = beside(model.folder)
    words = next((n for n in program.calls(EMBEDDING) if _reads(arguments(n)["ids"], "tokens")), None)
    head = program.outputs["logits"].meta["val"].shape[-1]
    limits = [size for size in (told.context, *tables.values()) if size]
    made = {
        "kind": "decoder",
        "family": told.family or "onnx",
        "vocabulary": int(head),
        "context": int(min(limits)) if limits else None,
        "eos": list(told.eos),
    }
    if words is not None:
        made["hidden"] = int(program.weights[str(arguments(words)["weight"].target)].shape[1])
    return made


def tables(program: Program) -> dict[str, int]:
    """Rows of each stored table that is looked up with positions."""
    found = {}
    for node in program.calls(EMBEDDING, torch.ops.aten.embedding.default):
        a = arguments(node)
        ids, weight = a.get("ids", a.get("indices")), a["weight"]
        if _reads(ids, "positions") and weight.op == "get_attr":
            found[str(weight.target)] = program.weights[str(weight.target)].shape[0]
    return found


def _reads(node: Any, name: str) -> bool:
    """An input of the Program, as it is or in another shape or type."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder" and node.target == name
