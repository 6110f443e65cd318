"""transformers in bfloat16 as an engine of the side-by-side benchmark: `eager`, or `compile` with a static cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve import Clock, Run, serve


def convert(checkpoint: Path, out: Path, variant: str, threads: int) -> dict[str, Any]:
    """Nothing to convert: the checkpoint is read as it is."""
    out.unlink(missing_ok=True)
    out.symlink_to(checkpoint.resolve(), target_is_directory=True)
    config = json.loads((checkpoint / "config.json").read_text())
    whole = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {"bytes": whole, "read_bytes": whole - config["vocab_size"] * config["hidden_size"] * 2}  # one row is read


def load(model: Path, variant: str, threads: int, context: int) -> tuple[Run, dict[str, Any]]:
    """The model with torch's fused attention, in a bare loop, which is faster than `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    caches: dict[int, StaticCache] = {}  # one a length: attention reads all of a static cache, so it must not be longer

    @torch.inference_mode()
    def eager(tokens: Sequence[int], new: int) -> dict[str, Any]:
        clock = Clock()
        out = lm(torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1)
        clock.tick(out.logits[0, -1].argmax())
        while len(clock.tokens) < new:
            last = torch.tensor([clock.tokens[-1:]])
            out = lm(last, past_key_values=out.past_key_values, use_cache=True)
            clock.tick(out.logits[0, -1].argmax())
        return clock.reply()

    step = torch.compile(lm.forward, dynamic=False)

    @torch.no_grad()
    def static(tokens: Sequence[int], new: int) -> dict[str, Any]:
        length = len(tokens) + new
        if length not in caches:
            caches[length] = StaticCache(config=lm.config, max_cache_len=length)
        cache = caches[length]
        clock = Clock()
        cache.reset()
        ids = torch.tensor([list(tokens)])
        # the prompt runs uncompiled, as in `generate`: its length is another every time
        out = lm(ids, past_key_values=cache, position_ids=torch.arange(len(tokens))[None], logits_to_keep=1)
        clock.tick(out.logits[0, -1].argmax())
        for place in range(len(tokens), length - 1):
            last, position = torch.tensor([clock.tokens[-1:]]), torch.tensor([[place]])
            out = step(last, past_key_values=cache, position_ids=position)
            clock.tick(out.logits[0, -1].argmax())
        return clock.reply()

    return {"eager": eager, "compile": static}[variant], {}


if __name__ == "__main__":
    serve(convert, load, ("transformers", "torch"))
