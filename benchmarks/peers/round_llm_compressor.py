"""llm-compressor's rounding of a model's products: GPTQ, AWQ, or to the nearest; `rounded.py` says what is asked."""

from __future__ import annotations

import torch
from rounded import Asked, answer


def rounded(model: torch.nn.Module, asked: Asked) -> torch.nn.Module:
    """The model with its linear layers but the head in symmetric integers, one scale a group, on the given tokens."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    weights = {"num_bits": asked.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": asked.group}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    modifiers = {"gptq": GPTQModifier, "awq": AWQModifier, "nearest": QuantizationModifier}
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # AWQ pins memory, which torch refuses without an accelerator
    rows = asked.calibration.tolist()
    texts = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=model,
        dataset=texts,
        recipe=[modifiers[asked.method](**scheme)],
        max_seq_length=asked.calibration.shape[1],
        num_calibration_samples=len(rows),
    )
    return model


if __name__ == "__main__":
    answer(rounded)
