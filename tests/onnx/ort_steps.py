"""Runs an exported decoder in onnxruntime, token by token, beside the Program's own decode path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smelt.codegen.onnx import Exported, export
from smelt.model import Compiled
from smelt.quality import replay

STEPS = 64


class Steps:
    """A session whose cache grows by every call. `config` is `genai_config.json`, which names everything."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.config: dict[str, Any] = json.loads((folder / "genai_config.json").read_text())["model"]
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
        self._past: dict[str, Any] = {}
        self._length = 0

    def __call__(self, tokens: torch.Tensor) -> np.ndarray[Any, Any]:
        """Logits [B, T, V] behind new tokens [B, T]."""
        decoder = self.config["decoder"]
        count, new = tokens.shape
        empty = np.zeros((count, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
        ends = self._length, self._length + new
        given = {
            decoder["inputs"]["input_ids"]: tokens.numpy(),
            decoder["inputs"]["attention_mask"]: np.ones((count, ends[1]), np.int64),
        }
        if "position_ids" in decoder["inputs"]:
            given["position_ids"] = np.tile(np.arange(*ends), (count, 1))
        names = {
            decoder["outputs"][f"present_{role}_names"] % at: decoder["inputs"][f"past_{role}_names"] % at
            for at in range(decoder["num_hidden_layers"])
            for role in ("key", "value")
        }
        past = {name: self._past.get(name, empty) for name in names.values()}
        logits, *cache = self._session.run(["logits", *names], {**given, **past})
        self._past, self._length = dict(zip(names.values(), cache, strict=True)), ends[1]
        return np.asarray(logits)


def exported(compiled: Compiled, folder: Path, **options: Any) -> Exported:
    """The ort export of a compiled decoder."""
    return export(compiled.program, folder, "ort", assets=compiled.assets.files, **options)


def replayed(compiled: Compiled, prompt: int, count: int = 1, steps: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [B, prompt + steps] and the Program's logits [B, steps, V] that predict those behind the prompt."""
    random = torch.Generator().manual_seed(prompt)
    tokens = torch.randint(0, int(compiled.program.facts["vocabulary"]), (count, prompt + steps), generator=random)
    return tokens, replay(compiled.plan, tokens, prompt)


def disagreement(folder: Path, tokens: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest relative error of any step's logits, by norm."""
    return float(disagreements(folder, tokens, wanted).max())


def disagreements(folder: Path, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Relative errors of each step's logits, by norm: the prompt at once, then single tokens."""
    steps = Steps(folder)
    prompt = tokens.shape[1] - wanted.shape[1]
    parts = [steps(tokens[:, :prompt])[:, -1:]]
    parts += [steps(tokens[:, at : at + 1]) for at in range(prompt, tokens.shape[1] - 1)]
    got = torch.from_numpy(np.concatenate(parts, 1))
    return (got - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
