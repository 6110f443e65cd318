"""Speculation: equality on many prompts, tokens a step, wall clock against no speculation, and the host's part.

python benchmarks/speculation.py                             # every recipe that drafts, on the bundled model
python benchmarks/speculation.py --recipes aded --prompts 20 --timed 4

Every prompt is continued greedily and with three seeds at temperature 1, with and without speculation: in batches for
equality, alone and over 4-bit weights and KIVI's cache; then some of them one at a time and in turns, so that whatever
slows the machine slows all: drafting at every step, pausing while that does not pay, and without drafts. `host` is the
share of a speculative step in which no model runs: drafting, accepting, committing. Peers: transformers' prompt lookup
on the same model. Steps are also timed at the shape of 430 M parameters. `--wide` takes the bundled model at that shape
(`widened.py`): the same answers, from weights that no cache holds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decode import checkpoint
from rich.console import Console
from rich.table import Table
from widened import widened

import smelt
from smelt.codegen.build import threads
from smelt.ir.decode import Walk
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.recipes import load, shipped
from smelt.runtime.generate import Decoding
from smelt.runtime.session import Session
from smelt.runtime.text import Tokenizer
from smelt.speed import spread
from smelt.texts import held_out_text, training_texts

ROOT = Path(__file__).resolve().parents[1]
COUNTED = 2_000_000  # bytes of text for drafters that count
GREEDY: dict[str, Any] = {}
SEEDS = (1, 2, 3)
ROWS = 8  # prompts of a batch
REPEATS = 6  # of the host's part
COMPRESSED: tuple[dict[str, Any], ...] = ({"weights.quantize": {"bits": 4}}, {"include": "kivi"})
PARTS = ("equality", "speed", "peers", "shape")
REQUESTS: tuple[dict[str, Any], ...] = (GREEDY, *({"temperature": 1.0, "seed": seed} for seed in SEEDS))


@dataclass
class Tally:
    """What requests of one kind took. `ratios`: of speed to that without drafts; `paced`: where drafting may pause.

    `kept`: what is left of a request's tokens a step as speed.
    """

    steps: int = 0
    tokens: int = 0
    ratios: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    paced: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """JSON form: tokens a step, and the ratio of tokens a second with quartiles."""
        low, median, high = spread(self.ratios)
        return {
            "tokens_per_step": self.tokens / max(1, self.steps),
            "speedup": median,
            "speedup_quartiles": [low, high],
            "kept_quartiles": list(spread(self.kept)),
            "speedup_paced": spread(self.paced).median,
            "tokens_per_second": spread(self.rate).median,
        }


def equality(compiled: Compiled, prompts: Sequence[Sequence[int]], new: int) -> dict[str, int]:
    """How many answers are the same with and without speculation, of those that the plan promises to be."""
    plan = compiled.program.decode
    assert plan is not None
    promised = [r for r in REQUESTS if plan.exact and (isinstance(plan.accept, Walk) or r is GREEDY)]
    equal = 0
    for first in range(0, len(prompts), ROWS):
        batch = [list(prompt) for prompt in prompts[first : first + ROWS]]
        for request in promised:
            made, plain = (
                compiled.complete(batch, max_new_tokens=new, eos=(), speculate=speculate, **request).rows
                for speculate in ("always", False)
            )
            equal += sum(a.tokens == b.tokens for a, b in zip(made, plain, strict=True))
    return {"equal": equal, "asked": len(promised) * len(prompts)}


def measure(compiled: Compiled, prompts: Sequence[Sequence[int]], new: int) -> dict[str, Any]:
    """All requests one at a time, with and without speculation in turns."""
    kinds = {"greedy": Tally(), "sampled": Tally()}
    for _ in range(2):  # builds and binds what is missing
        for speculate in ("always", True, False):
            compiled.complete([list(prompts[0])], max_new_tokens=new, eos=(), speculate=speculate)
    for prompt in prompts:
        for request in REQUESTS:
            tally = kinds["greedy" if request is GREEDY else "sampled"]
            made, paced, plain = (
                compiled.complete([list(prompt)], max_new_tokens=new, eos=(), speculate=speculate, **request)
                for speculate in ("always", True, False)
            )
            tally.steps += made.steps
            tally.tokens += made.step_tokens
            tally.ratios.append(made.tokens_per_second / plain.tokens_per_second)
            tally.kept.append(tally.ratios[-1] * made.steps / made.step_tokens)
            tally.paced.append(paced.tokens_per_second / plain.tokens_per_second)
            tally.rate.append(made.tokens_per_second)
    return {name: tally.told() for name, tally in kinds.items()} | {"host": host(compiled, prompts[0], new)}


def over(name: str, under: Sequence[dict[str, Any]] = COMPRESSED) -> dict[str, Any]:
    """A recipe's steps behind others, which insert the cache."""
    steps = [step.content() for step in load(name, catalogue()).steps if step.pass_name != "cache.insert"]
    return {
        "name": name,
        "family": "deploy",
        "does": "Drafts over what was made smaller.",
        "steps": [*under, *steps],
    }


def _shortened(name: str, updates: int | None) -> list[str]:
    """Overrides that end a recipe's training after so many updates: what drafters know changes no answer."""
    steps = [step.pass_name for step in load(name, catalogue()).steps]
    return [f"{step}.steps={updates}" for step in steps if updates and step.startswith("train.")]


def host(compiled: Compiled, prompt: Sequence[int], new: int) -> dict[str, float]:
    """Milliseconds of a speculative step, and the share of it that is not the model's step or the draft model's.

    What a model's step is: its kernels, the choice of the tokens in them, and the addresses that they are given before.
    Of several generations the fastest; `usual_host_share` is the median of them.
    """
    spent, step, begin = [0.0], Session.step, Decoding._step

    def timed(self: Session, *args: Any, **options: Any) -> Any:
        bound = self.bound(args[0].shape[1], options.get("last") is not None)
        run = bound.run

        def watched() -> None:
            start = time.perf_counter()
            run()
            spent[0] += time.perf_counter() - start

        bound.run = watched  # type: ignore[method-assign]
        try:
            return step(self, *args, **options)
        finally:
            del bound.run

    def begun(self: Decoding, drafts: bool) -> Any:
        if not self.counts.steps:  # what ran so far read the prompt, which is not counted
            spent[0] = 0.0
        return begin(self, drafts)

    Session.step, Decoding._step = timed, begun  # type: ignore[method-assign]
    try:
        request: dict[str, Any] = {"eos": (), "temperature": 1.0, "speculate": "always"}
        found = []
        for _ in range(REPEATS):
            made = compiled.complete([list(prompt)], max_new_tokens=new, **request)
            found.append((made.decode_seconds / made.steps, max(0.0, 1 - spent[0] / made.decode_seconds)))
    finally:
        Session.step, Decoding._step = step, begin  # type: ignore[method-assign]
    best, share = min(found[1:])  # the first one binds
    usual = statistics.median(share for _, share in found[1:])
    return {"step_ms": 1e3 * best, "host_share": share, "host_ms": 1e3 * best * share, "usual_host_share": usual}


def costs(folder: Path) -> dict[str, Any]:
    """Of the 430 M shape by w4a8: milliseconds of a step by tokens, and what drafting by recycling adds to it."""
    checkpoint(folder)
    base: list[dict[str, Any]] = [{"include": "w4a8"}]
    recipe = {"name": "shape", "family": "deploy", "does": "Takes time.", "steps": base}
    compiled = smelt.compile(str(folder), recipe)
    prompt = list(range(5, 261))
    session = Session(compiled.plan, 1, 512)
    session.prefill([prompt])
    steps = {}
    for tokens in (1, 2, 4, 8, 16):
        session.step(torch.zeros(1, tokens, dtype=torch.int64), len(prompt) + torch.arange(tokens)[None])
        taken = []
        for _ in range(30):
            start = time.perf_counter()
            session.bound(tokens).run()
            taken.append(time.perf_counter() - start)
        steps[tokens] = 1e3 * statistics.median(taken)
    hosts = {}
    for nodes in (3, 7):
        steps_ = [*base, {"decode.recycle": {"width": 8, "nodes": nodes}}]
        drafting = smelt.compile(str(folder), {**recipe, "steps": steps_})
        hosts[nodes] = host(drafting, prompt, 64)
    return {"step_ms": steps, "recycling": hosts}


def transformers_lookup(model: str, prompts: Sequence[Sequence[int]], new: int, threads_: int) -> dict[str, Any]:
    """transformers' prompt lookup, greedy, in tokens a second."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads_)
    rates = []
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt in prompts[:20]:
        ids = torch.tensor([list(prompt)])
        start = time.perf_counter()
        with torch.no_grad():
            out = lm.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                prompt_lookup_num_tokens=10, pad_token_id=0,
            )  # fmt: skip
        rates.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    return {"tokens_per_second": spread(rates).median}


def main() -> int:
    """Exit code 1 if some recipe that promises equality does not keep it."""
    options = _options()
    if options.wide:
        widened(options.model, options.wide)
    model, texts = str(options.wide or options.model), training_texts(COUNTED)
    kind = "speculation-wide" if options.wide else "speculation"
    place = options.results / f"{kind}-{datetime.date.today().isoformat()}.json"
    before = json.loads(place.read_text()) if options.add and place.is_file() else {}
    rows: dict[str, dict[str, Any]] = before.get("rows", {})
    ids = Tokenizer(options.model).encode(held_out_text())
    stride = (len(ids) - options.length) // max(1, options.prompts - 1)
    prompts = [ids[i * stride : i * stride + options.length] for i in range(options.prompts)]
    each = {"equality", "speed"} & set(options.parts)
    for name in (options.recipes or _drafting()) if each else ():
        print(f"{name} …", file=sys.stderr, flush=True)
        sets = _shortened(name, options.updates)
        recipe = over(name, [{"include": options.under}]) if options.under else name
        compiled = smelt.compile(model, recipe, calibration=texts, overrides=sets)
        if compiled.program.decode is None:  # a decoder, but no drafter
            continue
        row = rows.setdefault(f"{name} over {options.under}" if options.under else name, {})
        if sets:
            row["updates"] = options.updates
        if "equality" in options.parts:
            row["alone"] = equality(compiled, prompts, options.new)
            compressed = smelt.compile(model, over(name), calibration=texts, overrides=sets)
            row["compressed"] = equality(compressed, prompts, options.new)
        if "speed" in options.parts:
            row |= measure(compiled, prompts[: options.timed], options.new)
    peers = before.get("peers", {})
    if "peers" in options.parts:
        peers["transformers, prompt lookup"] = transformers_lookup(model, prompts, options.new, threads())
    shape = before.get("shape")
    if "shape" in options.parts:
        shape = costs(options.checkpoint)
        print(json.dumps(shape, indent=1))
    _tell(rows, peers)
    facts = {
        "date": datetime.date.today().isoformat(),
        "prompts": len(prompts),
        "timed": options.timed,
        "new": options.new,
        "threads": threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "smelt": smelt.__version__,
    }
    place.write_text(json.dumps({**before, **facts, "rows": rows, "peers": peers, "shape": shape}, indent=1) + "\n")
    held = [row[kind] for row in rows.values() for kind in ("alone", "compressed") if kind in row]
    return int(any(each["equal"] != each["asked"] for each in held))


def _drafting() -> list[str]:
    """The recipes that train nothing: those that train take minutes each, and are named to be measured."""
    return [*(h.name for h in shipped() if h.family == "decode" and not h.needs.training), "joined-drafts"]


def _tell(rows: Mapping[str, Mapping[str, Any]], peers: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table(title="speculation against none, the same artefact")
    for header in (
        "recipe",
        "equal",
        "compressed",
        "tokens a step",
        "speed (with pauses), kept",
        "tokens/s",
        "sampled: tokens a step",
        "speed (with pauses), kept",
        "host",
    ):
        table.add_column(header, justify="left" if header == "recipe" else "right")
    for name, row in rows.items():
        equal = [f"{row[k]['equal']}/{row[k]['asked']}" if k in row else "" for k in ("alone", "compressed")]
        if "greedy" not in row:
            table.add_row(name, *equal)
            continue
        greedy, sampled = row["greedy"], row["sampled"]
        table.add_row(
            name,
            *equal,
            f"{greedy['tokens_per_step']:.2f}",
            f"× {greedy['speedup']:.2f} ({greedy['speedup_paced']:.2f}), {greedy['kept_quartiles'][1]:.0%}",
            f"{greedy['tokens_per_second']:.0f}",
            f"{sampled['tokens_per_step']:.2f}",
            f"× {sampled['speedup']:.2f} ({sampled['speedup_paced']:.2f}), {sampled['kept_quartiles'][1]:.0%}",
            f"{row['host']['host_share']:.0%} of {row['host']['step_ms']:.2f} ms",
        )
    for name, peer in peers.items():
        table.add_row(name, "", "", "", "", f"{peer['tokens_per_second']:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=smelt.reference_model(), help="folder of a transformers model")
    parser.add_argument("--recipes", nargs="+", metavar="NAME")
    wide, default = (Path(tempfile.gettempdir()) / name for name in ("smelt-wide", "smelt-llama-430m"))
    parser.add_argument("--wide", type=Path, nargs="?", const=wide, help="at the 430 M shape, kept there between runs")
    parser.add_argument("--checkpoint", type=Path, default=default, help="of the 430 M shape, kept between runs")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--timed", type=int, default=20, help="prompts of the timed part")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--under", metavar="NAME", help="a recipe whose steps stand before a drafting one's")
    parser.add_argument("--updates", type=int, help="of recipes that train; equality asks for few")
    parser.add_argument("--add", action="store_true", help="keep what today's JSON holds and is not measured again")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
