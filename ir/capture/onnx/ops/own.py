"""Ops of the dialect that an importer found written out in ONNX's own."""

from __future__ import annotations

import torch

from ..registry import Tensor, op


@op("Quantized", domain="smelt")
def quantized(x: Tensor, *, bits: int, group: int) -> Tensor:
    rounded: Tensor = torch.ops.smelt.quantized(x, bits, group)
    return rounded
