"""Decodes with a 430 M parameter Llama of random weights on one GPU: target triton against transformers.

python benchmarks/gpu_decode.py                                  # none, finequant and w4a8; a JSON under results
python benchmarks/gpu_decode.py --recipes none --new-tokens 64
python benchmarks/gpu_decode.py --interpret                      # no GPU: a tiny model through the same checks

All read the same bfloat16 checkpoint and take turns within one run. Before it is timed, every recipe's logits on the
GPU are compared with those of target torch, the reference on the CPU; beside one that is off stands no speed.
transformers runs eager, and compiled with a static cache (mode reduce-overhead, that is as CUDA graphs).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import decode
import torch

import smelt
from smelt.codegen.lower import lower
from smelt.ir.program import Program
from smelt.runtime.session import Session
from smelt.speed import (
    Runner,
    Timing,
    compiled_runner,
    decode_rate,
    prefill_rate,
    race,
    ratio,
    transformers_model,
)

ROOT = Path(__file__).resolve().parents[1]
# of the largest logit: rounded activations meet ties, and a cache of two bytes is rounded where sums differ
TOLERANCE = {"none": 2e-4}
ROUNDED = 2e-2
STEPS = 3  # that are compared
TINY = {"HIDDEN": 64, "LAYERS": 2, "HEADS": 4, "KV_HEADS": 2, "INTERMEDIATE": 96, "VOCABULARY": 128}


def main() -> int:
    """Print and write down what was measured; 1 where a check fails."""
    options = _options()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
        vars(decode).update(TINY)
    elif not torch.cuda.is_available():
        print("no CUDA device: --interpret runs the checks without one", file=sys.stderr)
        return 2
    device = "cpu" if options.interpret else "cuda"
    decode.checkpoint(options.folder)
    runners: dict[str, Runner] = {}
    found: dict[str, Any] = {}
    prompts = torch.randint(
        decode.VOCABULARY, (2, options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    ).tolist()
    for recipe in options.recipes.split(","):
        name, start = f"smelt {recipe}", time.monotonic()
        compiled = smelt.compile(options.folder, recipe, target="triton")
        made = time.monotonic()
        facts = found[name] = {"compile_seconds": made - start, "weight_bytes": compiled.program.nbytes}
        facts["error"] = error = _error(compiled.program, prompts[0])
        facts["check_seconds"] = time.monotonic() - made
        print(f"{name}: error {error:.1e}, compiled in {made - start:.0f} s", flush=True)
        if error <= TOLERANCE.get(recipe, ROUNDED):
            runners[name] = compiled_runner(compiled)
        else:
            facts["failed"] = f"error {error:.1e}"
    if not options.no_rivals:
        model = transformers_model(str(options.folder)).to(device)
        runners["transformers eager"] = _eager(model)
        runners["transformers compiled"] = _static(model, options.prompt_tokens + options.new_tokens)
    for name, runner in list(runners.items()):
        try:
            start = time.monotonic()
            runner(prompts[0], options.new_tokens)
            found.setdefault(name, {})["warm_seconds"] = time.monotonic() - start
        except Exception as fault:  # a rival's failure is its own
            if name.startswith("smelt"):
                raise
            found[name] = {"failed": f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"}
            del runners[name]
            print(f"{name}: {found[name]['failed']}")
    timings = race(runners, prompts, options.new_tokens, options.rounds) if runners else {}
    for name, taken in timings.items():
        rates = decode_rate(taken), prefill_rate(taken)
        found[name] |= {"decode": rates[0]._asdict(), "prefill": rates[1]._asdict()}
        words = f"{rates[0].median:.0f} tokens/s decoded ({rates[0].low:.0f} to {rates[0].high:.0f})"
        for rival in [other for other in timings if other.startswith("transformers") and other != name]:
            spread = ratio(taken, timings[rival])
            found[name].setdefault("over", {})[rival] = spread._asdict()
            words += f", × {spread.median:.2f} of {rival}"
        print(f"{name}: runs" if options.interpret else f"{name}: {words}, {rates[1].median:.0f} read")
    if not options.interpret:
        _write(options, found)
    return int(any("failed" in facts for name, facts in found.items() if name.startswith("smelt")))


def _error(program: Program, prompt: Sequence[int]) -> float:
    """The largest difference of logits, of the largest logit: the prompt's end and steps behind it, both targets."""
    logits = []
    for target in ("triton", "torch"):
        session = Session(lower(program, target), 1, len(prompt) + STEPS)  # type: ignore[arg-type]
        each = [session.prefill([list(prompt)])["logits"].clone()]
        for token in range(STEPS):
            positions = torch.tensor(session.cache.lengths)[:, None]
            each.append(session.step(torch.tensor([[token]]), positions)["logits"].flatten(0, 1).clone())
            session.cache.commit([[0]])
        logits.append(torch.cat(each).float())
    error = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    return float(error.nan_to_num(nan=torch.inf))


def _eager(model: Any) -> Runner:
    """transformers' forward and its cache in a bare loop, faster than `generate`; tokens are read at the end."""

    @torch.inference_mode()
    def run(prompt: Sequence[int], new: int) -> Timing:
        options = {"use_cache": True, "logits_to_keep": 1}
        return _timed(model, prompt, new, lambda ids, cache: model(ids, past_key_values=cache, **options))

    return run


def _static(model: Any, longest: int) -> Runner:
    """The same loop over a static cache, its steps compiled to CUDA graphs; the prompt is read uncompiled."""
    from transformers import StaticCache

    how = {"mode": "reduce-overhead"} if model.device.type == "cuda" else {"backend": "eager"}
    step = torch.compile(model.forward, fullgraph=True, **how)
    cache = StaticCache(config=model.config, max_cache_len=longest)

    @torch.inference_mode()
    def run(prompt: Sequence[int], new: int) -> Timing:
        cache.reset()

        def forward(ids: torch.Tensor, _: Any) -> Any:
            if ids.shape[1] > 1:
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            torch.compiler.cudagraph_mark_step_begin()
            return step(ids, past_key_values=cache, use_cache=True)

        return _timed(model, prompt, new, forward)

    return run


def _timed(model: Any, prompt: Sequence[int], new: int, forward: Callable[[torch.Tensor, Any], Any]) -> Timing:
    """Greedy tokens, each read on the host as whoever shows them must."""
    start = time.perf_counter()
    out = forward(torch.tensor([list(prompt)], device=model.device), None)
    token = out.logits[:, -1:].argmax(-1)
    made = [token.item()]
    ready = time.perf_counter()
    for _ in range(new - 1):
        out = forward(token, out.past_key_values)
        token = out.logits[:, -1:].argmax(-1)
        made.append(token.item())
    return Timing(len(prompt), ready - start, time.perf_counter() - ready, new - 1, new - 1)


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    import transformers
    import triton

    device = torch.cuda.get_device_name()
    said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "commit": options.commit or said.stdout.strip(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "engines": found,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    short = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    place = options.results / f"gpu-decode-{short}-{datetime.date.today().isoformat()}.json"
    place.write_text(json.dumps(facts, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "smelt-llama-430m"
    parser.add_argument("--recipes", default="none,finequant,w4a8", help="parted by commas")
    parser.add_argument("--folder", type=Path, default=default, help="where the checkpoint is kept between runs")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="how often each of two prompts is asked")
    parser.add_argument("--no-rivals", action="store_true", help="leave transformers out")
    parser.add_argument("--interpret", action="store_true", help="a tiny model on the CPU; times nothing")
    parser.add_argument("--commit", default="", help="written beside the numbers; default: what git says")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
