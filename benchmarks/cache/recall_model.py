"""Makes the model that recall is measured with: the reference model, taught to find lines in contexts of 8192 tokens.

    PYTHONPATH=src:benchmarks python -m cache.recall_model FOLDER      # some minutes on two cores

The reference model was trained at 512 tokens. Here its rotation is slowed down as in Llama 3.1: pairs of dimensions
that turned less than once within 512 tokens turn as far within 8192 now, fast ones as before. Then it goes on learning:
code, and the answers to questions about lines in it, in contexts that grow from lesson to lesson.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

import smelt
from smelt.runtime.text import Tokenizer
from smelt.texts import training_texts

from .tasks import Words, lesson

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TRAINED = 512  # tokens that the reference model saw at once
SHOWN = 10  # steps between two lines of progress
FACTS = "course.json"  # written last: it says that the folder is complete


@dataclass(frozen=True)
class Course:
    """How the model is taught; the default takes some five minutes of one core."""

    stages: tuple[tuple[int, int], ...] = ((512, 24), (1024, 10), (2048, 8), (4096, 8), (8192, 6))
    """Tokens of a row, and steps with such rows."""
    tokens: int = 8192  # of a step
    rate: float = 1e-3
    context: int = 8192
    seed: int = 0


def recall_model(folder: Path, course: Course = Course()) -> Path:
    """The folder, with the model in it: one that was made by the same course is left as it is."""
    facts = folder / FACTS
    told = json.loads(json.dumps(asdict(course)))
    if facts.exists() and json.loads(facts.read_text())["course"] == told:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    words = Words.of(Tokenizer(smelt.reference_model()), "\n".join(training_texts()))
    start, used = time.monotonic(), time.process_time()
    model = _extended(course)
    for said in teach(model, words, course):
        print(said, file=sys.stderr, flush=True)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smelt.reference_model() / name, folder / name)
    spent = {"seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time() - used)}
    facts.write_text(json.dumps({"course": told, **spent}))
    return folder


def teach(model: LlamaForCausalLM, words: Words, course: Course) -> Iterator[str]:
    """Train in place; yields a line of progress now and then."""
    source = random.Random(course.seed)
    steps = [length for length, count in course.stages for _ in range(count)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start = time.monotonic()
    for step, length in enumerate(steps):
        warm, cool = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / len(steps)))
        for group in optimizer.param_groups:
            group["lr"] = course.rate * warm * (0.05 + 0.95 * cool)
        rows = [lesson(words, length, source) for _ in range(max(1, course.tokens // length))]
        text, answers, exact = _losses(model, rows)
        optimizer.zero_grad()
        (text + answers).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not step % SHOWN or step == len(steps) - 1:
            spent = time.monotonic() - start
            losses = f"code {text.item():.2f}, answers {answers.item():.3f}"
            yield f"{spent:5.0f} s  step {step + 1} of {len(steps)}  rows of {length}: {losses}, {exact:.0%} exact"
    model.eval()


def _extended(course: Course) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(course.seed)
    config = LlamaConfig.from_pretrained(smelt.reference_model())
    config.max_position_embeddings = course.context
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": course.context / TRAINED,
        "original_max_position_embeddings": TRAINED,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    return LlamaForCausalLM.from_pretrained(smelt.reference_model(), config=config, dtype=torch.float32)


def _losses(
    model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean losses of all tokens and of those of answers, and the share of those that are right."""
    tokens = torch.tensor([row for row, _ in rows])
    row, place = torch.tensor([(i, place) for i, (_, places) in enumerate(rows) for place in places]).T
    # every fourth token is enough of the code: the head is as wide as all of the layers
    text = torch.arange(tokens.numel())[torch.arange(tokens.numel()) % tokens.shape[1] % 4 == 0]
    picked = torch.cat([row * tokens.shape[1] + place, text])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[picked]).float()
    wanted = tokens.flatten()[picked + 1]
    losses = functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits[: len(row)].argmax(-1) == wanted[: len(row)]).float().mean().item()
    return losses[len(row) :].mean(), losses[: len(row)].mean(), right


def main() -> None:
    """Make it where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=Course.seed)
    options = parser.parse_args()
    print(recall_model(options.folder, Course(seed=options.seed)))


if __name__ == "__main__":
    main()
