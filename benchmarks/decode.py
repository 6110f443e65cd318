"""Decodes with a 430 M parameter Llama of random weights: smelt against transformers, and the memory of compiling.

python benchmarks/decode.py                        # finequant, about 4 GB of disk and a few minutes
python benchmarks/decode.py --recipe none --rounds 5

Both read the same bfloat16 checkpoint and take turns within one run. Random weights decode as fast as trained ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import smelt
from smelt.speed import (
    compiled_runner,
    decode_rate,
    per_step,
    prefill_rate,
    race,
    ratio,
    transformers_model,
    transformers_runner,
)

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 1024, 24, 16, 4, 4096, 32000
PEAK = """
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak * 1024)
"""
IDLE = "import torch\n" + PEAK
COMPILE = "import sys, smelt\nsmelt.compile(sys.argv[1], sys.argv[2]).save(sys.argv[3])\n" + PEAK


def main() -> None:
    """Print and write down what was measured."""
    options = _options()
    folder = options.folder
    checkpoint(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(prefix="smelt-decode-") as work:
        out = Path(work) / "out.smelt"
        peak = _peak(COMPILE, str(folder), options.recipe, str(out)) - _peak(IDLE)
        compiled = smelt.load(out)
        runners = {
            "smelt": compiled_runner(compiled),
            "transformers": transformers_runner(transformers_model(str(folder))),
        }
        random = torch.Generator().manual_seed(0)
        prompts = torch.randint(
            compiled.program.facts["vocabulary"], (2, options.prompt_tokens), generator=random
        ).tolist()
        timings = race(runners, prompts, options.new_tokens, options.rounds)
        weights = compiled.program.nbytes
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "recipe": options.recipe,
        "threads": torch.get_num_threads(),
        "checkpoint_bytes": size,
        "weight_bytes": weights,
        "peak_bytes_of_compiling": peak,
        "peak_over_checkpoint": peak / size,
        "decode_ratio": ratio(timings["smelt"], timings["transformers"])._asdict(),
    }
    for name, taken in timings.items():
        rates = {"decode": decode_rate(taken)._asdict(), "prefill": prefill_rate(taken)._asdict()}
        found[name] = {**rates, "tokens_per_step": per_step(taken)}
        low, median, high = decode_rate(taken)
        print(f"{name}: {median:.1f} tokens/s decoded ({low:.1f} to {high:.1f}), {prefill_rate(taken).median:.0f} read")
    low, median, high = ratio(timings["smelt"], timings["transformers"])
    print(f"smelt decodes × {median:.2f} as fast ({low:.2f} to {high:.2f})")
    print(f"weights {weights / 1e6:.0f} MB, checkpoint {size / 1e6:.0f} MB")
    print(f"compiling took {peak / 1e6:.0f} MB of memory, {peak / size:.2f} of the checkpoint")
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"decode-{options.recipe}-{found['date']}.json"
    place.write_text(json.dumps(found, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "smelt-llama-430m"
    parser.add_argument("--recipe", default="finequant")
    parser.add_argument("--folder", type=Path, default=default, help="where the checkpoint is kept between runs")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="how often each of two prompts is asked")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    return parser.parse_args()


def checkpoint(folder: Path) -> None:
    """Write the model unless it is there: a shard a layer, so that never more than one is in memory."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    names: dict[str, str] = {}
    for number, shapes in enumerate(_shards()):
        shard = f"model-{number:05}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=random) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps(_config()))  # last: it says that the rest is complete


def _shards() -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a layer at a time."""
    narrow = HIDDEN // HEADS * KV_HEADS
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    yield {"lm_head.weight": (VOCABULARY, HIDDEN)}
    for number in range(LAYERS):
        layer = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (narrow, HIDDEN),
            "self_attn.v_proj": (narrow, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        yield {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eos_token_id": 0,
    }


def _peak(script: str, *arguments: str) -> int:
    """Most resident bytes of a fresh interpreter that runs a script, as the script prints them."""
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
