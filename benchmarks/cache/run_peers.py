"""A peer's side of the cache benchmark: kvpress and transformers' quantized caches, asked what our caches are asked.

Runs in the peers' own Python, which has no smelt:  python run_peers.py JOB.json  prints a line of JSON a contestant.
What peers keep in floating point is counted as 16 bits; they compute in float32. kvpress compresses once a prompt is
read and keeps whatever comes later as it is; a quantized cache encodes all of it anew whenever its newest part is full.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

CHUNK = 16  # tokens of a step of the replay


class Contestant:
    """One way to keep the cache: `press` compresses a prompt's, `quantized` stores it in few bits; neither is dense."""

    def __init__(self, model: Any, spec: dict[str, Any]) -> None:
        self.model, self.spec = model, spec
        self.press = None
        if spec.get("press"):
            import kvpress

            self.press = getattr(kvpress, spec["press"])(**spec["options"])

    def prefill(self, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The compressed cache of prompts [B, T], and the logits [B, V] behind their last tokens."""
        if self.spec.get("quantized"):
            from transformers import QuantizedCache

            cache = QuantizedCache(self.spec["quantized"], self.model.config, **self.spec["options"])
        else:
            cache = DynamicCache()
        with self.press(self.model) if self.press else contextlib.nullcontext():
            logits = self.model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return cache, logits.float()

    def step(self, cache: Any, tokens: torch.Tensor, at: int) -> torch.Tensor:
        """Logits [B, T, V] of tokens that stand at position `at` and come through the cache."""
        positions = torch.arange(at, at + tokens.shape[1]).expand(tokens.shape[0], -1)
        return self.model(tokens, past_key_values=cache, position_ids=positions).logits.float()

    def replay(self, windows: Sequence[Sequence[int]], prefix: int) -> torch.Tensor:
        """Logits [N, T - prefix, V] behind each window's prompt."""
        out = []
        for window in windows:
            tokens = torch.tensor([window])
            cache, first = self.prefill(tokens[:, :prefix])
            logits = [first[:, None]]
            for at in range(prefix, len(window) - 1, CHUNK):
                logits.append(self.step(cache, tokens[:, at : min(at + CHUNK, len(window) - 1)], at))
            out.append(torch.cat(logits, 1))
        return torch.cat(out)

    def recall(self, asked: Sequence[dict[str, Any]]) -> float:
        """Share of right answers; `asked`: prompts, each with its questions."""
        right = total = 0
        for each in asked:
            prompt = torch.tensor([each["prompt"]])
            cache, _ = self.prefill(prompt)
            for question, answer in each["questions"]:
                tokens = torch.tensor([[*question, *answer[:-1]]])
                logits = self.step(_copied(cache), tokens, prompt.shape[1])
                right += logits[0, -len(answer) :].argmax(-1).tolist() == answer
                total += 1
        return right / total

    def bits(self, prompt: Sequence[int]) -> float:
        """Bits that the cache of a prompt holds, for each value that the dense one would."""
        cache, _ = self.prefill(torch.tensor([prompt]))
        config = self.model.config
        width = config.num_key_value_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        values = len(prompt) * 2 * width * config.num_hidden_layers
        return 8 * sum(_bytes(layer) for layer in cache.layers) / values

    def rate(self, prompt: Sequence[int], new: int) -> float:
        """Decoded tokens a second, greedy."""
        cache, logits = self.prefill(torch.tensor([prompt]))
        token = logits.argmax(-1)[:, None]
        start = time.perf_counter()
        for at in range(len(prompt), len(prompt) + new):
            token = self.step(cache, token, at)[:, -1:].argmax(-1)
        return new / (time.perf_counter() - start)


def _copied(cache: Any) -> Any:
    """A cache that shares its tensors with this one: layers replace theirs and write into none."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


def _bytes(layer: Any) -> int:
    """Bytes of all tensors that a layer of a cache holds."""
    seen: dict[int, int] = {}
    todo, known = list(vars(layer).values()), set()
    while todo:
        value = todo.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        inner = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif any(isinstance(part, torch.Tensor) for part in inner):
            todo += inner
        elif isinstance(value, torch.Tensor):
            size = 2 if value.is_floating_point() else value.element_size()
            seen[id(value)] = value.numel() * size
    return sum(seen.values())


def measure(contestant: Contestant, job: dict[str, Any], dense: dict[int, torch.Tensor]) -> dict[str, Any]:
    """Everything that is asked; `dense` gathers the logits of the first contestant, which changes nothing."""
    found: dict[str, Any] = {"bits": contestant.bits(job["prompt"]), "rate": contestant.rate(job["prompt"], job["new"])}
    for name, asked in job["exams"].items():
        found[name] = contestant.recall(asked)
    found["replay"] = {}
    for length, text in job["windows"].items():
        logits = contestant.replay(text["tokens"], text["prefix"])
        reference = dense.setdefault(length, logits)
        targets = torch.tensor(text["tokens"])[:, text["prefix"] :]
        found["replay"][length] = _fidelity(reference, logits, targets)
    return found


def _fidelity(dense: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    losses = [functional.cross_entropy(x.flatten(0, 1), targets.flatten()) for x in (logits, dense)]
    ours, wanted = (functional.log_softmax(x, -1) for x in (logits, dense))
    return {
        "perplexity": losses[0].exp().item(),
        "ratio": (losses[0] - losses[1]).exp().item(),
        "kl": (wanted.exp() * (wanted - ours)).sum(-1).mean().clamp(min=0).item(),
        "top1": (logits.argmax(-1) == dense.argmax(-1)).float().mean().item(),
    }


def contest(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One result a contestant; whatever one raises is its result."""
    models: dict[str, Any] = {}
    dense: dict[int, torch.Tensor] = {}
    for spec in [{"name": "dense", "options": {}}, *job["contestants"]]:
        attention = spec.get("attention", "sdpa")
        try:
            if attention not in models:
                models[attention] = AutoModelForCausalLM.from_pretrained(
                    job["model"], dtype=torch.float32, attn_implementation=attention
                ).eval()
            yield {"name": spec["name"], **measure(Contestant(models[attention], spec), job, dense)}
        except Exception as fault:  # a package that is missing, a press that refuses the model
            yield {"name": spec["name"], "error": (str(fault).strip() or type(fault).__name__).splitlines()[-1]}


def main() -> None:
    """Answer the job."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print must not come between the replies
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    with torch.no_grad():
        for found in contest(job):
            print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    main()
