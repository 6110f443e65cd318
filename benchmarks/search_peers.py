"""What a search finds here and in EvoPress's published code: the same model, tokens, levels and generations.

python benchmarks/search_peers.py --evopress ~/EvoPress                     # a checkout of IST-DASLab/EvoPress

bits: products in integers of 2 to 6 bits by GPTQ in groups of 64, of 3 bits on average; theirs searches over the very
matrices that ours does. depth: as many attention parts left out as feed-forward parts; ours may leave out any as many.
A number is KL(source || found) in nats on held-out text, an entry a sample of text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from weights import LENGTH, ROOT, STAGES, Model

import smelt
from smelt.ir.blocks import blocks
from smelt.ir.encoding import Affine
from smelt.passes._finished import Finished
from smelt.passes.base import Samples
from smelt.passes.prune.drop import Drop
from smelt.passes.search._budget import Budget
from smelt.passes.search.spend import Spend

LEVELS = tuple(Affine(bits, 64) for bits in (2, 3, 4, 5, 6))
SCALES = 16 / 64  # stored bits of a weight's scale


def theirs(checkout: Path, script: str, tokens: Path, generations: int, options: Sequence[object], seed: int) -> None:
    """Runs one of their searches on tokens in a file, through the stages of ours."""
    texts, survivors = [stage.texts * LENGTH for stage in STAGES], [stage.survivors for stage in STAGES]
    asked = ["--model_name_or_path", smelt.reference_model(), "--calibration_data", tokens]
    asked += ["--calibration_tokens", texts[-1], "--calibration_sequence_length", LENGTH, "--use_fast_tokenizer"]
    asked += ["--eval_datasets", tokens, "--eval_tokens", LENGTH, "--eval_sequence_length", LENGTH]
    asked += ["--eval_every", generations, "--generations", generations, "--offspring", 16, "--seed", seed]
    asked += ["--dtype", "float32", "--fitness_fn", "kl", "--initially_generated", 16, "--initial_tokens", texts[-1]]
    asked += ["--survivors_per_selection", *survivors, "--tokens_per_selection", *texts, *options]
    runner = ROOT / "benchmarks" / "peers" / "search_evopress.py"
    done = subprocess.run([sys.executable, runner, checkout, script, *map(str, asked)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr.strip()[-2000:]}")


def by_bits(model: Model, sample: Samples, checkout: Path, generations: int, seed: int) -> dict[str, float]:
    """KL at three bits: even, by our search, and by theirs."""
    step = Spend(Budget(bits=3 + SCALES), LEVELS, solver="gptq", stages=STAGES, generations=generations, seed=seed)
    found = {"even": model.kl([replace(step, weights=LEVELS[1:2], generations=1)], sample)}
    found["smelt"] = model.kl([step], sample)
    space, _ = step._space(model.program, sample, Finished.of(model.program, step._solving, sample))
    with tempfile.TemporaryDirectory(prefix="smelt-peer-") as folder:
        place, program = Path(folder), model.program.fork()
        for name, weights in space.weights.items():
            layer = place / "levels" / name.removesuffix(".weight")
            layer.mkdir(parents=True)
            for encoding, weight in zip(LEVELS, weights, strict=True):
                assert weight.encoding == encoding
                torch.save(weight.dense(), layer / f"{encoding.width}.pth")
        torch.save([row[None] for row in sample.tokens], place / "tokens.pth")
        options = ("--target_bitwidth", 3, "--quant_weights_path", place / "levels")
        theirs(checkout, "evo_quant_search.py", place / "tokens.pth", generations, options, seed)
        (told,) = (place / "levels").glob("evo-kl-configuration-*.txt")
        for line in told.read_text().splitlines():
            name, width = line.split(": ")
            program.weights[f"{name}.weight"] = space.weights[f"{name}.weight"][int(width) - 2]
        found["evopress"] = model.kl_of(program)
    return found


def by_depth(
    model: Model, sample: Samples, checkout: Path, generations: int, seed: int, layers: int
) -> dict[str, float]:
    """KL without so many attention and so many feed-forward parts: by influence, by our search, and by theirs."""
    count = len(blocks(model.program)) // 2
    step = Spend(Budget(blocks=2 * layers), depth=True, stages=STAGES, generations=generations, seed=seed)
    found = {"influence": model.kl([Drop(layers / count, unit="block")], sample), "smelt": model.kl([step], sample)}
    with tempfile.TemporaryDirectory(prefix="smelt-peer-") as folder:
        place = Path(folder)
        torch.save([row[None] for row in sample.tokens], place / "tokens.pth")
        options = ("--sparsity", (layers + 0.5) / count, "--drop_config_dir", place)
        theirs(checkout, "evo_drop_search.py", place / "tokens.pth", generations, options, seed)
        told = (place / "layer_drop_config.txt").read_text().split()
    out = {part: tuple(i for i, each in enumerate(told) if part in each) for part in ("attn", "mlp")}
    assert len(out["attn"]) == len(out["mlp"]) == layers
    found["evopress"] = model.kl([Drop(attention=out["attn"], feedforward=out["mlp"])], sample)
    return found


def rows(checkout: Path, kept: Path, seeds: int, generations: int) -> Iterator[tuple[str, dict[str, float]]]:
    """By what is searched for, a sample at a time."""
    model = Model(kept)
    for seed in range(seeds):
        sample = model.kept_sample(seed)
        for layers in (1, 2):
            yield f"depth, {2 * layers} of 12", by_depth(model, sample, checkout, generations, seed, layers)
        yield "bits, 3", by_bits(model, sample, checkout, generations, seed)


def main() -> int:
    """Prints each row as it is there, and writes all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evopress", type=Path, required=True, help="a checkout")
    parser.add_argument("--seeds", type=int, default=4, help="samples of text")
    parser.add_argument("--generations", type=int, default=40, help="of each search, 16 offspring each")
    parser.add_argument("--kept", type=Path, help="folder of levels and evaluations; a run that was killed goes on")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    kept = options.kept or Path(tempfile.mkdtemp(prefix="smelt-kept-"))
    found: dict[str, list[float]] = {}
    for what, told in rows(options.evopress.resolve(), kept, options.seeds, options.generations):
        for name, kl in told.items():
            found.setdefault(f"{what}, {name}", []).append(kl)
        print(what, "  ".join(f"{name} {kl:.4g}" for name, kl in told.items()), flush=True)
    for name, values in found.items():
        print(f"{name:32} {statistics.mean(values):.4g}  {' '.join(f'{v:.4g}' for v in values)}")
    place = options.results / f"search-peers-{datetime.date.today().isoformat()}.json"
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {place}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
