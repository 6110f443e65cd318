"""The reference model, exported by two recipes: 4-bit weights, and a quantized, evicting cache over 512 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import smelt
import smelt.export
from smelt.codegen.onnx import export
from smelt.runtime.onnx_loop import loop

pytest.importorskip("onnxruntime", reason="runs what is exported in onnxruntime")
pytestmark = pytest.mark.slow


def test_four_bit_weights_agree_and_are_not_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smelt.export, "STEPS", 8)
    monkeypatch.setattr(smelt.export, "LONGEST", 64)
    lm = smelt.compile(smelt.reference_model(), "finequant", target="torch")
    done = lm.export_onnx(tmp_path / "out")
    assert done.error is not None and done.error < 1e-3 and all(case.text for case in done.cases)
    assert done.written.manifest["weight_bytes"] < 1.01 * lm.program.nbytes


def test_a_quantized_evicting_cache_runs_512_steps_in_constant_memory(tmp_path: Path) -> None:
    lm = smelt.compile(smelt.reference_model(), "quantized-pruning", target="torch")
    export(lm.program, tmp_path / "out")
    running = loop(tmp_path / "out", 1, 640)
    random = torch.Generator().manual_seed(0)
    token = running.prefill([torch.randint(0, 4096, (120,), generator=random).tolist()])["logits"].argmax(-1)
    shapes = {name: value.shape for name, value in running.state.items()}
    for step in range(512):
        token = running.step(token.tolist())["logits"].argmax(-1)
        if step == 127:
            early = resident()
    assert {name: value.shape for name, value in running.state.items()} == shapes
    assert resident() - early < 4e6
    dense = 6 * 2 * 2 * 64 * 640 * 2  # layers, keys and values, heads, dims, tokens, bytes
    assert running.nbytes < 0.8 * dense  # layers 0 and 1 keep every token, in 4 bits


def resident() -> float:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
