"""torchao's rounding of a model's products to the nearest, or with fitted zeros; `rounded.py` says what is asked."""

from __future__ import annotations

import torch
from rounded import Asked, answer


def rounded(model: torch.nn.Module, asked: Asked) -> torch.nn.Module:
    """The model with its linear layers but the head in symmetric integers, one scale a group."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{asked.bits}"), granularity=PerGroup(asked.group))
    quantize_(model, config, lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name)
    return model


if __name__ == "__main__":
    answer(rounded)
