"""What weights lose by each way to store fewer of them: the bundled model, held-out text, several samples of text.

python benchmarks/weights.py                     # every part
python benchmarks/weights.py sparsity --seeds 4

A part is a function in PARTS that gives rows of numbers by name, an entry a sample. Where nothing else is said a number
is KL(source || changed) on held-out text in nats, whole windows at once and without kernels; all samples come from the
same text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from decode import LAYERS, checkpoint

import smelt
from smelt.assets import Assets
from smelt.codegen.gemv import Gemv
from smelt.ir.capture.hf import capture_hf
from smelt.ir.cost import cost
from smelt.ir.encoding import NM, Affine, Bitmap, Dense
from smelt.ir.encoding.tiered import Tiered
from smelt.ir.interpret import interpret
from smelt.ir.ops import HEAD, QUANTIZED, is_op
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.model import Compiled
from smelt.passes.activations.quantize import Quantize as Rounded
from smelt.passes.base import Checkpoints, Pass, Samples
from smelt.passes.cache.insert import Insert
from smelt.passes.measure import compare, perplexity, replay
from smelt.passes.prune._gates import find_places
from smelt.passes.prune.drop import Drop
from smelt.passes.prune.sparsify import Sparsify
from smelt.passes.search._budget import Budget
from smelt.passes.search._evolve import Stage
from smelt.passes.search._space import Stored
from smelt.passes.search.spend import Spend
from smelt.passes.tune._attention import maps
from smelt.passes.tune.recover import Recover
from smelt.passes.weights.fold import Fold
from smelt.passes.weights.gptq import Gptq
from smelt.passes.weights.quantize import Quantize
from smelt.passes.weights.rotate import Rotate
from smelt.passes.weights.untie import Untie
from smelt.runtime.text import Tokenizer
from smelt.speed import compiled_runner, race
from smelt.texts import Text, held_out_text, training_texts

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 6  # of held-out text
SAMPLE, LENGTH = 16, 256  # sequences of a sample of text, and the tokens of each and of a window

STAGES = (Stage(1, 6), Stage(4, 2), Stage(16, 1))  # of searches
GENERATIONS = 8  # of those over weights
BITS = tuple(Affine(bits, 64) for bits in (2, 3, 4, 8))
SPARSE = (NM(1, 4, Affine(8, 32)), NM(2, 4, Affine(4, 64)), NM(2, 4, Affine(8, 64)))
CACHES = (Stored(), *(Stored(Affine(b, 32, "channel", True), Affine(b, 32, "token", True)) for b in (4, 2)))


class Model:
    """The bundled model, the tokens that it is calibrated on, and what it answers on held-out text.

    kept: where searches leave solved levels and evaluations, for others on the same text and after a kill.
    """

    def __init__(self, kept: Path | None = None) -> None:
        self.kept = kept

    @cached_property
    def program(self) -> Program:
        """As it is stored."""
        return capture_hf(smelt.reference_model())

    @cached_property
    def _tokens(self) -> torch.Tensor:
        return torch.tensor(Tokenizer(smelt.reference_model()).encode("\n".join(training_texts())))

    @cached_property
    def _windows(self) -> torch.Tensor:
        tokens = Tokenizer(smelt.reference_model()).encode(held_out_text())
        return Text(tokens, int(self.program.facts["vocabulary"]), LENGTH).windows[:WINDOWS]

    @cached_property
    def _wanted(self) -> torch.Tensor:
        return self._logits(self.program)

    def sample(self, seed: int, count: int = SAMPLE) -> Samples:
        """Sequences from random places of the training text."""
        starts = torch.randint(len(self._tokens) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
        return Samples(torch.stack([self._tokens[at : at + LENGTH] for at in starts.tolist()]))

    def kept_sample(self, seed: int, count: int = SAMPLE) -> Samples:
        """The same for a search."""
        return replace(self.sample(seed, count), checkpoints=Checkpoints(self.kept) if self.kept else None)

    def kl(self, steps: Sequence[Pass], samples: Samples) -> float:
        """How far the model is from itself after some passes, in nats."""
        return self.kl_of(self.after(steps, samples))

    def kl_of(self, program: Program) -> float:
        """How far another program is from the model, in nats."""
        return compare(self._wanted, self._logits(program)).kl

    def after(self, steps: Sequence[Pass], samples: Samples) -> Program:
        """What some passes make of the model."""
        program = self.program.fork()
        for each in steps:
            each.apply(program, samples)
        return program

    def perplexity(self, logits: torch.Tensor | None = None) -> float:
        """Of held-out text, by logits for its windows; without, by the model's own."""
        wanted = self._wanted if logits is None else logits
        return perplexity(wanted[:, :-1].flatten(0, 1), self._windows[:, 1:].flatten())

    @torch.no_grad()
    def _logits(self, program: Program) -> torch.Tensor:
        given = {"tokens": self._windows, "positions": torch.arange(LENGTH).expand(self._windows.shape)}
        return interpret(program, {name: given[name] for name in program.inputs})["logits"]


def sparsity(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Half of the weights, anywhere in a row and two of four, by magnitude, Wanda and SparseGPT."""
    scored = Sparsify(score="magnitude"), Sparsify(score="wanda"), Sparsify(score="sparsegpt")
    for pattern in ("unstructured", "2:4"):
        for step in (replace(each, pattern=pattern) for each in scored):
            runs = 1 if step.calibration == "none" else seeds
            yield f"{pattern} {step.score}", [model.kl([step], model.sample(seed)) for seed in range(runs)]


def integers(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Integers with one scale a row: rounded to nearest, in clipped ranges, by GPTQ, turned before that, and RSQ."""
    turned = [Untie(), Fold(), Rotate(which=("residual", "values"))]
    samples = [model.sample(seed) for seed in range(seeds)]
    for bits in (4, 3):
        plain = Quantize(bits=bits, group=0, head="keep")
        yield f"{bits} bits, nearest", [model.kl([plain], samples[0])]
        yield f"{bits} bits, clipped", [model.kl([replace(plain, range="mse")], samples[0])]
        gptq = Gptq(bits=bits, group=0, head="keep")
        ways: dict[str, list[Pass]] = {"gptq": [gptq], "gptq, turned": [*turned, gptq]}
        ways["rsq"] = [*turned, replace(gptq, tokens="attended")]
        for name, steps in ways.items():
            yield f"{bits} bits, {name}", [model.kl(steps, sample) for sample in samples]


def blocks(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """2 and 3 of the 12 attention and feed-forward parts left out on 8 sequences, in four ways; the last lists all."""
    for count in (2, 3):
        summed = Spend(Budget(blocks=count), depth=True, by="additive", stages=STAGES)
        searches = summed, replace(summed, by="evolution"), replace(summed, by="exhaustive")
        steps: dict[str, Pass] = {"influence": Drop(count / 12, unit="block"), **{each.by: each for each in searches}}
        for name, step in steps.items():
            yield f"{count} by {name}", [model.kl([step], model.kept_sample(seed, 8)) for seed in range(seeds)]


def bits(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Three bits in groups of 64 everywhere, and as many bits on average."""
    nearest = Spend(Budget(bits=3.25), BITS, stages=STAGES, generations=GENERATIONS)
    for way in (nearest, replace(nearest, solver="gptq")):
        for name, step in (("even", replace(way, weights=BITS[1:2])), ("evolution", way)):
            yield f"{way.solver} {name}", [model.kl([step], model.kept_sample(seed)) for seed in range(seeds)]


def mixture(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """0.4 of the bytes of weights and a cache of 1024 tokens, and 0.25 with one of 256, by one kind of level or more.

    The held-out text is read through that cache. Sparse weights alone are kept as float16; with bits they are integers
    too. A cache alone cannot save as much. Levels are solved once for all searches on a sample.
    """
    source = model.program.fork()
    Insert().apply(source, None)
    wanted = replay(source, model._windows, LENGTH // 4, LENGTH)
    kept = tuple(NM(keep, of) for keep, of in ((1, 8), (1, 4), (2, 4)))
    solved = {"vocabulary": True, "solver": "gptq"}
    single = {"depth": {"depth": True}, "bits": {"weights": BITS, **solved}, "sparsity": {"weights": kept, **solved}}
    pair = {"bits and cache": {"weights": BITS, "cache": CACHES, **solved}}
    every = {"all": {"weights": (*BITS, *SPARSE), "cache": CACHES, "depth": True, **solved}}
    budgets = {"0.4": Budget(share=0.4), "0.25": Budget(share=0.25, context=256)}
    for (share, budget), (name, levels) in product(budgets.items(), {**single, **pair, **every}.items()):
        step, found = Spend(budget, generations=GENERATIONS, stages=STAGES, **levels), list[float]()  # type: ignore[arg-type]
        for seed in range(seeds):
            program = source.fork()
            outcome = step.apply(program, model.kept_sample(seed))
            print(f"{share} by {name}: {outcome.notes['evaluations']}, {outcome.notes['spent']}", file=sys.stderr)
            found.append(compare(wanted, replay(program, model._windows, LENGTH // 4, LENGTH)).kl)
        yield f"{share} by {name}", found


def depth(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Steps of the 430 M shape without a quarter of its layers, and without 30 % of its neurons and one KV head of 4.

    How much less of the weights a step reads, and how much of that share it is faster than one of the whole model,
    request by request; for an idle machine. Which units leave makes no difference, and STAT leaves as many.
    """
    folder = Path(tempfile.gettempdir()) / "smelt-llama-430m"
    checkpoint(folder)
    source = capture_hf(folder)
    made = {"whole": source, "depth": source.fork(), "stat": source.fork()}
    out = tuple(range(1, LAYERS, 4))
    Drop(attention=out, feedforward=out).apply(made["depth"], None)
    for place in find_places(made["stat"], ("neurons", "heads"))[0]:
        count = int(place.index.max()) + 1
        left = 64 * round(0.7 * count / 64) if count > 64 else round(0.7 * count)
        place.leave(made["stat"], torch.arange(count) < left, torch.ones(count), None)
    runners, read = {}, {}
    for name, program in made.items():
        derive(program)
        Insert(dtype="float16").apply(program, None)
        runners[name] = compiled_runner(Compiled(program, {}, Assets()))
        read[name] = cost(program).evaluate(S=96).weight_bytes
    timings = race(runners, [[7 * i % 1000 for i in range(64)]] * seeds, 64, 1)
    for name in ("depth", "stat"):
        removed = 1 - read[name] / read["whole"]
        yield f"{name}: no longer read", [removed]
        pairs = zip(timings["whole"], timings[name], strict=True)
        yield f"{name}: saved of that", [(1 - less.decode / whole.decode) / removed for whole, less in pairs]


def products(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Microseconds of a product [4096, 1024] with one row, of the 430 M shape, by how its matrix is stored.

    As many copies as a model has layers take turns, so that none stays in a cache.
    """
    shape, x, out = (4096, 1024), torch.randn(1, 1024), torch.empty(1, 4096)
    w = torch.randn(shape)
    half = w.masked_fill(w.abs() < w.abs().median(), 0.0)
    stored = {
        "half of float16": Weight(shape, *Bitmap().coded(half)),
        "dfloat11": Weight(shape, *Tiered.coded(w.bfloat16())),
    }
    asked = {"float16": Dense("float16"), "bfloat16": Dense("bfloat16"), "2:4 of float16": NM(2, 4)}
    asked |= {f"int{bits}": Affine(bits, 128) for bits in (8, 4, 3, 2)}
    for name, encoding in {**asked, "2:4 of int4": NM(2, 4, Affine(4, 64))}.items():
        stored[name] = Weight(shape, encoding, encoding.alone(w))
    copies = {name: [Gemv(held.encoding).bind(held.parts, shape) for _ in range(24)] for name, held in stored.items()}
    found: dict[str, list[float]] = {name: [] for name in copies}
    for turn in range(seeds + 1):  # the first builds kernels
        for name, bound in copies.items():
            start = time.perf_counter()
            for each in bound:
                each(x, out)
            if turn:
                found[name].append((time.perf_counter() - start) / len(bound) * 1e6)
    yield from found.items()


def qat(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Integers with a scale a row and 8-bit activations: rounded, trained back a while, and so with EdgeQAT's terms.

    With each of them the perplexity relative to the model's own, and the KL where the half of the tokens that attend
    least to the first one is rounded to 4 bits behind that attention. Samples differ in the order of one text.
    """
    text = Samples(model._tokens[: 192 * 128].view(-1, 128), source=model.program)
    for plain, updates, rate in ((Quantize(bits=4, group=0), 24, 1e-3), (Quantize(bits=3, group=0), 16, 3e-3)):
        bits, rounded = plain.bits, [plain, Rounded(group=0)]
        lsq = Recover(learn=("norms", "scales", "codes"), steps=updates, batch=2, checks=1, holdout=0.02, rate=rate)
        ways = {"rounded": None, "lsq": lsq, "edgeqat": replace(lsq, attention=1.0, entropy=0.5)}
        for name, step in ways.items():
            learned = [[replace(step, seed=seed)] for seed in range(seeds)] if step else [[]]
            made = [model.after([*rounded, *each], text) for each in learned]
            said = [model._logits(program) for program in made]
            yield f"{bits} bits, {name}", [compare(model._wanted, each).kl for each in said]
            yield f"{bits} bits, {name}, perplexity", [model.perplexity(each) / model.perplexity() for each in said]
            halves = [compare(model._wanted, model._logits(_halved(program))).kl for program in made]
            yield f"{bits} bits, {name}, half in 4 bits", halves


def _halved(program: Program) -> Program:
    """With 4 bits for what products behind an attention read of the tokens that attend least to the first one."""
    part, seen = program.fork(), None
    known = set(maps(part).values())
    for node in part.graph.nodes:
        seen = node if node in known else seen
        if is_op(node, QUANTIZED) and seen is not None and not any(is_op(user, HEAD) for user in node.users):
            node.target, node.args = _by_token, (*node.args, seen)
    return part


def _by_token(x: torch.Tensor, bits: int, group: int, seen: torch.Tensor) -> torch.Tensor:
    order = seen[..., 0].sum(1).argsort(-1)  # [B, T] of maps [B, H, T, S]
    less = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, : order.shape[1] // 2], True)
    return torch.where(less[..., None], QUANTIZED.reference(x, 4, group), QUANTIZED.reference(x, bits, group))


def tuning(model: Model, seeds: int) -> Iterator[tuple[str, list[float]]]:
    """Integers of 2 bits by GPTQ, and after as many updates towards the model's own laws, each from the same start.

    Scales learn alone, or with codes straight through or by PV-Tuning; rates are the best of three (straight) and of
    two (pv) on a sample of another seed.
    """
    scales = Recover(steps=100, rate=1e-3)
    codes = replace(scales, learn=("norms", "scales", "codes"))
    ways = {"solved": None, "scales": scales, "straight": replace(codes, rate=3e-4), "pv": replace(codes, changes=0.01)}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(seeds):
        sample = replace(model.sample(seed), training=model.sample(1000 + seed, 512).tokens, source=model.program)
        solved = model.after([Gptq(bits=2, group=64, head="keep")], sample)
        for way, step in ways.items():
            program = solved.fork()
            if step:
                replace(step, seed=seed).apply(program, sample)
            found[way].append(compare(model._wanted, model._logits(program)).kl)
    yield from found.items()


PARTS: dict[str, Callable[[Model, int], Iterator[tuple[str, list[float]]]]] = {
    "integers": integers,
    "sparsity": sparsity,
    "blocks": blocks,
    "bits": bits,
    "mixture": mixture,
    "depth": depth,
    "products": products,
    "qat": qat,
    "tuning": tuning,
}


def main() -> int:
    """Prints each row as it is there, and writes it beside those of other parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seeds", type=int, default=4, help="samples of text")
    parser.add_argument("--kept", type=Path, help="folder of levels and evaluations; a run that was killed goes on")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part '{min(unknown)}'; known: {', '.join(PARTS)}")
    kept = options.kept or Path(tempfile.mkdtemp(prefix="smelt-kept-"))
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"weights-{datetime.date.today().isoformat()}.json"
    model, found = Model(kept), json.loads(place.read_text()) if place.exists() else {}
    for part in options.parts or PARTS:
        for name, values in PARTS[part](model, options.seeds):
            found.setdefault(part, {})[name] = values
            place.write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{part}: {name:24} {statistics.mean(values):.4g}  {' '.join(f'{v:.4g}' for v in values)}", flush=True
            )
    print(f"written to {place}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
