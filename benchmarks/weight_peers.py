"""What rounding costs here and elsewhere: the same model, sample tokens, bits and groups, and the same held-out text.

python benchmarks/weight_peers.py --python ~/peers/bin/python      # of an environment with the peers to compare with

Products are rounded to symmetric integers with a float16 scale for each group of 64 weights; head and tables stay. Each
peer runs in its own process, and answers with the logits of what it made, so that nothing of it is reinterpreted here.
A number is KL(source || rounded) in nats, an entry a sample of text; rounding to the nearest has one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from weights import ROOT, Model

import smelt
from smelt.passes.base import Pass, Samples
from smelt.passes.measure import compare
from smelt.passes.weights.gptq import Gptq
from smelt.passes.weights.quantize import Quantize
from smelt.passes.weights.scale import Scale

PEERS = {"llm-compressor": ("nearest", "gptq", "awq"), "torchao": ("nearest",)}
GROUP = 64


def ours(bits: int) -> dict[str, tuple[Pass, ...]]:
    """What stands beside the peers' methods."""
    nearest = Quantize(bits=bits, group=GROUP, head="keep")
    clipped = Quantize(bits=bits, group=GROUP, head="keep", range="mse")
    return {
        "nearest": (nearest,),
        "gptq": (Gptq(bits=bits, group=GROUP, head="keep"),),
        "awq": (Scale(rule="awq", bits=bits, group=GROUP), clipped),
    }


def theirs(python: Path, peer: str, method: str, bits: int, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [N, T, V] of the windows by a peer."""
    script = ROOT / "benchmarks" / "peers" / f"round_{peer.replace('-', '_')}.py"
    with tempfile.TemporaryDirectory(prefix="smelt-peer-") as folder:
        place = Path(folder)
        save_file(tokens, place / "tokens.safetensors")
        asked = {"model": str(smelt.reference_model()), "tokens": str(place / "tokens.safetensors"), "method": method}
        asked |= {"bits": bits, "group": GROUP, "out": str(place / "logits.safetensors")}
        (place / "request.json").write_text(json.dumps(asked))
        done = subprocess.run([python, script, place / "request.json"], cwd=place, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{peer}, {method}: {done.stderr.strip().splitlines()[-1:]}")
        return load_file(place / "logits.safetensors")["logits"]


def rows(python: Path, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """By bits, method and who rounds."""
    model = Model()
    samples = [model.sample(seed) for seed in range(seeds)]

    def kl(peer: str, method: str, bits: int, sample: Samples) -> float:
        tokens = {"calibration": sample.tokens, "windows": model._windows.contiguous()}
        return compare(model._wanted, theirs(python, peer, method, bits, tokens)).kl

    for bits in (4, 3):
        for method, steps in ours(bits).items():
            used = samples[:1] if method == "nearest" else samples
            yield f"{bits} bits, {method}, smelt", [model.kl(steps, sample) for sample in used]
            for peer in (peer for peer, methods in PEERS.items() if method in methods):
                yield f"{bits} bits, {method}, {peer}", [kl(peer, method, bits, sample) for sample in used]


def main() -> int:
    """Prints each row as it is there, and writes all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with the peers")
    parser.add_argument("--seeds", type=int, default=4, help="samples of text")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    found = {}
    for name, values in rows(options.python, options.seeds):
        found[name] = values
        print(f"{name:32} {statistics.mean(values):.4g}  {' '.join(f'{v:.4g}' for v in values)}", flush=True)
    place = options.results / f"weight-peers-{datetime.date.today().isoformat()}.json"
    place.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {place}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
