"""Reads back decoders that smelt exported with their cache: the step over a past becomes a graph over a whole text.

Such a file is known by its inputs. At the first step nothing is stored, so attention reads the new keys and values
alone, whatever form the cache has; and what its mask hides then, it hides in a text. What the file's own nodes say of
both is computed and compared, so that nothing rests on its names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from ...errors import SmeltError
from ..variants import TOLERANCE, relative_error
from .graph import Graph, Node, Port
from .load import Model
from .masks import Changes, Meaning, meanings
from .module import OnnxModule, reads
from .stored import Stored
from .trace import MOST
from .weights import Adopted

_TOKENS, _COUNTS, _LENGTHS = "tokens", "counts", "past.lengths"
_BUFFER = re.compile(r"past\.(\d+)\.(keys|values|places)(\.\w+)?")
_FAR = 12  # nodes between what a site stores and the attention that reads it
_COUNTING = {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Where", "Clip", "Trilu"}
_COMPARING = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}


def is_step(model: Model) -> bool:
    """Whether a file has the inputs of a decoder with its cache, as smelt exports it."""
    ports = {port.name: port for port in model.graph.inputs}
    whole = {_TOKENS: 2, _COUNTS: 1, _LENGTHS: 1}
    if any(n not in ports or ports[n].kind != TensorProto.INT64 or _rank(ports[n]) != r for n, r in whole.items()):
        return False
    others = [port for name, port in ports.items() if name not in whole]
    return bool(others) and all(_BUFFER.fullmatch(port.name) and port.shape is not None for port in others)


def whole_text(adopted: Adopted) -> Adopted:
    """The model with `tokens` as its only input and `logits` as its only output; notes say what was left out."""
    step = adopted.model
    where = step.where
    logits = next((port for port in step.graph.outputs if port.name == "logits"), None)
    if logits is None:
        raise SmeltError(f"{where}: has the inputs of a decoder that smelt exported, but no output 'logits'")
    model = only(step, [logits])
    sites = _Sites(model)
    masks = list(dict.fromkeys(node.inputs[3] for node, _, _ in sites.read if len(node.inputs) > 3))
    meant = _meanings(model, adopted, masks)
    changed = {}
    for node, key, value in sites.read:
        mask = node.inputs[3] if len(node.inputs) > 3 else ""
        found = meant.get(mask, "does not hide what comes later")
        if isinstance(found, str) or not found[0]:
            told = found if isinstance(found, str) else "hides nothing"
            raise SmeltError(f"{where}: {node.label} reads a cache, but its mask '{mask}' {told}")
        attributes = {**node.attributes, "is_causal": 1}
        if found[1] is not None:
            attributes["left_window_size"] = found[1] - 1
        changed[node.outputs[0]] = replace(node, inputs=(node.inputs[0], key, value), attributes=attributes)
    nodes = [changed.get(node.outputs[0], node) for node in model.graph.nodes]
    made = _started(replace(model, graph=replace(model.graph, nodes=tuple(nodes))))
    if left := sorted({name for node in made.graph.nodes for name in reads(node)} & _buffers(model)):
        raise SmeltError(
            f"{where}: '{left[0]}' is read by other nodes than ONNX's Attention, as attention with sinks is; "
            "such an export cannot be read back, compile the model that it was made of"
        )
    _compare(model, made, adopted)
    notes = [*adopted.notes, "the cache of the file was left out: a recipe gives the Program one"]
    if dropped := [p.name for p in step.graph.outputs if p.name != "logits" and not p.name.startswith("present.")]:
        notes.append(f"outputs {', '.join(dropped)} were left out: they belong to a drafter, which a recipe makes")
    return Adopted(made, adopted.weights, notes)


def only(model: Model, outputs: Sequence[Port]) -> Model:
    """The part of a model that computes `outputs`, with all inputs."""
    needed, nodes = {port.name for port in outputs}, []
    for node in reversed(model.graph.nodes):
        if needed.intersection(node.outputs):
            needed.update(reads(node))
            nodes.append(node)
    tensors = {name: stored for name, stored in model.graph.tensors.items() if name in needed}
    graph = replace(model.graph, outputs=tuple(outputs), nodes=tuple(nodes[::-1]), tensors=tensors)
    return replace(model, graph=graph)


class _Sites:
    """Attention nodes that read a site of the cache, each with the names of the new keys and values alone."""

    def __init__(self, model: Model) -> None:
        self.made_by = {name: node for node in model.graph.nodes for name in node.outputs}
        self.new: dict[str, tuple[str, str]] = {}  # by what joins them to the past: the role, and the name
        for node in model.graph.nodes:
            found = _BUFFER.fullmatch(node.inputs[0]) if node.inputs else None
            if found is None or found[2] == "places" or len(node.inputs) < 2:
                continue
            if (fresh := self._fresh(node, found[3])) is not None:
                self.new[node.outputs[0]] = found[2], fresh
        self.read: list[tuple[Node, str, str]] = []
        for node in model.graph.nodes:
            if (node.domain, node.op) != ("", "Attention") or not 3 <= len(node.inputs) <= 4:
                continue
            if node.attributes.get("left_window_size", -1) >= 0:
                continue
            key, value = self._site(node.inputs[1], "keys"), self._site(node.inputs[2], "values")
            if key is not None and value is not None:
                self.read.append((node, key, value))

    def _fresh(self, node: Node, part: str | None) -> str | None:
        """New tokens [B, G, T, D] that a node joins to a buffer: scattered into a dense one, or behind the tail."""
        if part is None:
            return self._uncast(node.inputs[1]) if node.op == "TensorScatter" else None
        if part != ".dense" or node.op != "Concat":
            return None
        turned = self.made_by.get(self._uncast(node.inputs[1]))
        if turned is None or turned.op != "Transpose" or tuple(turned.attributes.get("perm", ())) != (0, 2, 1, 3):
            return None
        return turned.inputs[0]

    def _uncast(self, name: str) -> str:
        while (made := self.made_by.get(name)) is not None and made.op == "Cast":
            name = made.inputs[0]
        return name

    def _site(self, name: str, role: str) -> str | None:
        """The new tokens of the nearest site that a value is made of."""
        level, seen = [name], {name}
        for _ in range(_FAR):
            for each in level:
                if each in self.new and self.new[each][0] == role:
                    return self.new[each][1]
            level = [n for each in level if each in self.made_by for n in reads(self.made_by[each]) if n not in seen]
            seen.update(level)
        return None


def _meanings(model: Model, adopted: Adopted, names: Sequence[str]) -> Mapping[str, Meaning | str]:
    """What each mask says at the first step, over the new tokens."""
    if not names:
        return {}
    part = only(model, [Port(name, TensorProto.BOOL, None) for name in names])

    def look(length: int, fill: int, changes: Changes) -> Mapping[str, torch.Tensor]:
        tokens = torch.full((2, length), fill, dtype=torch.int64)
        found = _answers(_changed(part, changes), adopted, _first_step(part, tokens))
        return {name: _new_part(mask, length) for name, mask in zip(names, found, strict=True)}

    return meanings(look, names, dict(_numbers(part)))


def _new_part(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The columns of new tokens, the last ones; as numbers where something of the empty past is seen."""
    past = mask[..., : mask.shape[-1] - length]
    return mask[..., mask.shape[-1] - length :] if not bool(past.any()) else torch.ones(mask.shape)


def _numbers(model: Model) -> Iterator[tuple[Hashable, float]]:
    """Stored whole numbers that nodes count and compare with, by node and input."""
    for i, node in enumerate(model.graph.nodes):
        if node.domain or node.op not in _COUNTING | _COMPARING:
            continue
        for j, name in enumerate(node.inputs):
            stored = model.graph.tensors.get(name)
            if stored is not None and stored.count == 1 and stored.kind in (TensorProto.INT64, TensorProto.INT32):
                yield (i, j), float(stored.array().reshape(-1)[0])


def _changed(model: Model, changes: Changes) -> Model:
    """The model with other numbers, by node and input."""
    if not changes:
        return model
    nodes, tensors = list(model.graph.nodes), dict(model.graph.tensors)
    for place, number in changes.items():
        assert isinstance(place, tuple)
        i, j = place
        old = tensors[nodes[i].inputs[j]]
        name = f"{old.name}.{i}.{j}.changed"
        tensors[name] = _stored(name, np.full(old.shape, int(number), old.array().dtype), old.kind)
        nodes[i] = replace(nodes[i], inputs=(*nodes[i].inputs[:j], name, *nodes[i].inputs[j + 1 :]))
    return replace(model, graph=replace(model.graph, nodes=tuple(nodes), tensors=tensors))


def _started(model: Model) -> Model:
    """The model over `tokens` alone: nothing is stored, and every token is real."""
    version = model.opsets.version
    names = {what: f"start/{what}" for what in ("shape", "rows", "width", "first", "second", "none")}
    tensors = {
        names["first"]: _stored(names["first"], np.array([0])),
        names["second"]: _stored(names["second"], np.array([1])),
    }

    def node(op: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> Node:
        return Node(output, "", op, version("", op), inputs, (output,), attributes)

    head = (
        node("Shape", (_TOKENS,), names["shape"]),
        node("Gather", (names["shape"], names["first"]), names["rows"], axis=0),
        node("Gather", (names["shape"], names["second"]), names["width"], axis=0),
        node("Expand", (names["width"], names["rows"]), _COUNTS),
        node("Expand", (names["first"], names["rows"]), _LENGTHS),
    )
    graph = model.graph
    inputs = tuple(port for port in graph.inputs if port.name == _TOKENS)
    full = Graph(graph.name, inputs, graph.outputs, (*head, *graph.nodes), {**graph.tensors, **tensors})
    return only(replace(model, graph=full), graph.outputs)


def _stored(name: str, array: Any, kind: int = TensorProto.INT64) -> Stored:
    return Stored(name, kind, tuple(array.shape), array.tobytes())


def _first_step(model: Model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The file's inputs where nothing is stored; buffers have room for `tokens`, or for one page."""
    rows, length = tokens.shape
    known = {_TOKENS: tokens, _COUNTS: torch.full((rows,), length), _LENGTHS: torch.zeros(rows, dtype=torch.int64)}
    given = []
    for port in model.graph.inputs:
        if port.name not in known:
            dense = _BUFFER.fullmatch(port.name)
            open_size = length if dense is not None and dense[3] is None and dense[2] != "places" else 1
            shape = [rows, *(d if isinstance(d, int) else open_size for d in (port.shape or ())[1:])]
            if math.prod(shape) > MOST:
                raise SmeltError(
                    f"{model.where}: the input '{port.name}' has {shape} elements, more than a cache holds"
                )
            known[port.name] = torch.zeros(shape, dtype=_TYPES.get(port.kind, torch.float32))
        given.append(known[port.name])
    return given


_TYPES: dict[int, torch.dtype] = {
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT32: torch.int32,
}


def _compare(step: Model, made: Model, adopted: Adopted) -> None:
    """Raises SmeltError unless the first step of the file gives what the graph over a text gives."""
    tokens = torch.arange(1, 19).reshape(2, 9) % _words(step)
    with torch.no_grad():
        (meant,) = _answers(step, adopted, _first_step(step, tokens))
        (found,) = _answers(made, adopted, [tokens])
    if not relative_error(found, meant) <= TOLERANCE:
        raise SmeltError(f"{step.where}: its first step differs from what its attention says of a text")


def _answers(model: Model, adopted: Adopted, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the file's nodes compute, one by one."""
    module = OnnxModule(model, weights=adopted.weights)
    module.doubting = True
    found: tuple[torch.Tensor, ...] = module(*inputs)
    return found


def _words(model: Model) -> int:
    last = (model.graph.outputs[0].shape or (None,))[-1]
    return last if isinstance(last, int) and last > 0 else 2


def _buffers(model: Model) -> set[str]:
    return {port.name for port in model.graph.inputs if _BUFFER.fullmatch(port.name)}


def _rank(port: Port) -> int:
    return -1 if port.shape is None else len(port.shape)
