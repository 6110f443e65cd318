"""EvoPress's published searches on a machine without its accelerator; their files are run as they are.

python search_evopress.py CHECKOUT SCRIPT.py OPTIONS…, in a Python with torch and transformers. Three things are
answered in their place: `cuda` is the CPU, data sets are not there (calibration tokens come as a file), and a left-out
attention gives the two values that today's transformers take instead of three.
"""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch


def answered() -> None:
    """Put the answers in place, before anything of theirs is read."""
    from transformers import AutoModelForCausalLM

    load, move = AutoModelForCausalLM.from_pretrained, torch.Tensor.to

    def loaded(place: str, **_: Any) -> torch.nn.Module:
        return load(place, dtype=torch.float32).eval()

    def moved(tensor: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        cpu = {name: "cpu" if value == "cuda" else value for name, value in more.items()}
        return move(tensor, *("cpu" if isinstance(each, str) and each == "cuda" else each for each in where), **cpu)

    AutoModelForCausalLM.from_pretrained = loaded
    torch.Tensor.to = moved  # type: ignore[method-assign]
    torch.cuda.is_available = lambda: True
    torch.cuda.manual_seed_all = lambda seed: None
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    from src import model_utils

    theirs = model_utils.make_dummy_forward

    def left_out(module: torch.nn.Module, kind: str = "attn+mlp") -> None:
        theirs(module, kind)
        if kind == "attn":
            module.forward = lambda *_, **__: (0, None)

    model_utils.make_dummy_forward = left_out


if __name__ == "__main__":
    checkout, script = Path(sys.argv[1]), sys.argv[2]
    sys.path.insert(0, str(checkout))
    sys.argv = sys.argv[2:]
    answered()
    runpy.run_path(str(checkout / script), run_name="__main__")
