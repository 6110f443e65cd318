"""Weights stay in their files: capture and its check hold few decoded bytes at a time, and keep none."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers

from smelt.ir.capture import capture
from smelt.ir.weight import Mapped, Weight

LAYERS = 12


class Meter:
    """Counts the bytes of dense tensors that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.peak, self.total = 0, 0, 0
        plain = Weight.dense

        def dense(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            tensor = plain(weight, dtype)
            self._born(tensor.nbytes)
            weakref.finalize(tensor.untyped_storage(), self._died, tensor.nbytes)
            return tensor

        monkeypatch.setattr(Weight, "dense", dense)

    def _born(self, size: int) -> None:
        self.now, self.total = self.now + size, self.total + size
        self.peak = max(self.peak, self.now)

    def _died(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve equal layers in half precision, a vocabulary as large as one of them."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_no_more_than_a_layer_is_decoded_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(monkeypatch)
    program = capture(folder)
    gc.collect()
    decoded = 2 * program.nbytes  # half precision, widened
    layer = (decoded - 2 * 2 * 4 * 512 * 64) // LAYERS
    assert meter.total >= 1.9 * decoded, "the check did read everything, for the graph and for the source"
    assert meter.peak <= layer, "a layer's worth at the most"
    assert meter.now <= program.weights["model.rotary_emb.inv_freq"].nbytes, (
        "nothing is kept but what is in memory anyway"
    )


def test_the_program_maps_its_weights(folder: Path) -> None:
    program = capture(folder)
    stored = [weight for name, weight in program.weights.items() if "inv_freq" not in name]
    assert stored and all(isinstance(weight.parts, Mapped) for weight in stored)
