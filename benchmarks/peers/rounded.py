"""A peer's side of the comparison of roundings: reads one request, answers with the logits of the rounded model.

python round_NAME.py REQUEST.json, in a Python that has the peer. The request names the model's folder, a safetensors
file with `calibration` and `windows` int64 [N, T], the method, bits and group, and where the logits float32 go.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Asked:
    """How to round: `method` in the peer's own terms, and tokens int64 [N, T] to do it on."""

    method: str
    bits: int
    group: int
    calibration: torch.Tensor


def answer(rounded: Callable[[torch.nn.Module, Asked], torch.nn.Module]) -> None:
    """Round the model of the request that the command line names, and write what it says of the windows."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    request = json.loads(Path(sys.argv[1]).read_text())
    tokens = load_file(request["tokens"])
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32).eval()
    asked = Asked(request["method"], request["bits"], request["group"], tokens["calibration"])
    with torch.no_grad():
        logits = rounded(model, asked)(tokens["windows"]).logits
    save_file({"logits": logits.float().contiguous()}, request["out"])
