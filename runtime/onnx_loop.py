"""Drives an exported decoder in onnxruntime: prompts of any lengths, then a step at a time; the example of how to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import SmeltError

Arrays = dict[str, Any]


def open_session(folder: Path, threads: int = 0) -> Any:
    """A session on `model.onnx` whose products keep their activations in float32.

    By default onnxruntime 1.31 rounds what enters a product with integer weights to 8 bits, 1e-2 of the logits.
    """
    try:
        import onnxruntime
    except ImportError as fault:
        raise SmeltError("running an ONNX export needs the package onnxruntime: pip install 'smelt[onnx]'") from fault
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # it warns of every past that it cannot update in place
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


class Loop:
    """A cache and the graph that reads and writes it, for `batch` rows of up to `capacity` tokens."""

    def __init__(self, folder: str | Path, batch: int, capacity: int, session: Any = None) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / "smelt.json").read_text(encoding="utf-8"))
        self.session = session or open_session(self.folder)
        self.names = [output.name for output in self.session.get_outputs()]
        self.lengths = np.zeros(batch, np.int64)
        self.capacity = capacity
        self.state: Arrays = self._start(batch)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Arrays:
        """Read one prompt a row in one step; every output at each row's last token, [B, …]."""
        counts = np.array([len(prompt) for prompt in prompts], np.int64)
        tokens = np.zeros((len(prompts), int(counts.max())), np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        return self._read(tokens, counts)

    def step(self, tokens: Sequence[int]) -> Arrays:
        """Read one token a row; every output at it, [B, …]."""
        return self._read(np.asarray(tokens, np.int64)[:, None], np.ones(len(tokens), np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, stored or not."""
        return sum(int(value.nbytes) for name, value in self.state.items() if name != "past.lengths")

    def _read(self, tokens: Any, counts: Any) -> Arrays:
        if (most := int((self.lengths + counts).max())) > self.capacity:
            raise SmeltError(f"a row would reach {most} tokens, but the cache was made for {self.capacity}")
        found = dict(zip(self.names, self.session.run(None, self._inputs(tokens, counts)), strict=True))
        self.lengths = self.lengths + counts
        self.state = self._next(found)
        rows = np.arange(len(counts))
        return {name: value[rows, counts - 1] for name, value in found.items() if not name.startswith("present")}

    def _start(self, batch: int) -> Arrays:
        """Zeros for every `past.…`."""
        sizes: dict[str, int] = {"B": batch, "capacity": self.capacity}
        for name, rule in self.manifest["sizes"].items():
            sizes[name] = max(1, (self.capacity - rule["sink"] - rule["tail"]) // rule["page"])
        return {"past.lengths": np.zeros(batch, np.int64)} | {
            entry["past"]: np.zeros([sizes[d] if isinstance(d, str) else d for d in entry["shape"]], entry["dtype"])
            for entry in self.manifest["cache"]
        }

    def _inputs(self, tokens: Any, counts: Any) -> Arrays:
        return {"tokens": tokens, "counts": counts, **self.state}

    def _next(self, found: Arrays) -> Arrays:
        return {name.replace("present", "past", 1): found[name] for name in self.names if name.startswith("present.")}


class GrowingLoop(Loop):
    """The same for graphs with `input_ids`, `attention_mask` and `past_key_values`, whose cache grows by every step."""

    def _start(self, batch: int) -> Arrays:
        given = {entry.name: entry for entry in self.session.get_inputs()}
        return {
            name: np.zeros((batch, entry.shape[1], 0, entry.shape[3]), np.float32)
            for name, entry in given.items()
            if name.startswith("past_key_values")
        }

    def _inputs(self, tokens: Any, counts: Any) -> Arrays:
        past = next(iter(self.state.values())).shape[2]
        total = past + tokens.shape[1]
        inputs = {"input_ids": tokens, **self.state}
        inputs["attention_mask"] = (np.arange(total) < (self.lengths + counts)[:, None]).astype(np.int64)
        if "position_ids" in {entry.name for entry in self.session.get_inputs()}:
            across = np.arange(tokens.shape[1])
            inputs["position_ids"] = (self.lengths[:, None] + across) * (across < counts[:, None])
        return inputs

    def _next(self, found: Arrays) -> Arrays:
        return {n.replace("present", "past_key_values", 1): found[n] for n in self.names if n.startswith("present.")}


def loop(folder: str | Path, batch: int, capacity: int, session: Any = None) -> Loop:
    """The loop that the export's style asks for."""
    style = json.loads((Path(folder) / "smelt.json").read_text(encoding="utf-8"))["style"]
    return (GrowingLoop if style == "ort" else Loop)(folder, batch, capacity, session)
