"""Every pass over the cache behind every other one: refused, with the reason, or legal, and then tried.

python benchmarks/interactions.py [--write]: prints the table, or writes it to benchmarks/results/interactions.md.

A legal pair must store the same whatever the size of the steps that bring its tokens, take the bytes of its formula,
and give finite logits; what it costs is its KL to the dense cache on a small random model, a hint and no measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smelt.ir.cache import Cache
from smelt.ir.capture import capture
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.passes import Pass, Samples, catalogue
from smelt.passes.measure import compare, replay
from smelt.recipes import load

PROMPT, NEW = 120, 24
KEYS = {"affine": {"bits": 8, "axis": "channel", "group": 8, "zero": True}}
VALUES = {"affine": {"bits": 4, "axis": "token", "group": 32, "zero": True}}
SMALL = {"sink": 2, "tail": 16, "page": 16}
SCORE = {"cache.score": {"queries": 8}}
PROMPTED = {"cache.select": {"when": "prompt", "keep": 0.5, "skip_layers": [], **SMALL}}

CASES: Mapping[str, Sequence[Mapping[str, Any] | str]] = {
    "score": [SCORE],
    "select: page": [{"cache.select": {"score": "recency", "keep": 0.5, "skip_layers": [], **SMALL}}],
    "select: prompt": [SCORE, PROMPTED],
    "select: overflow": [
        {"cache.select": {"score": "key_norm", "when": "overflow", "budget": 48, "skip_layers": [], **SMALL}}
    ],
    "merge": [SCORE, PROMPTED, {"cache.merge": {"values_only": True}}],
    "transform: pre": [{"cache.transform": {}}],
    "transform: compact": [{"cache.transform": {"compact": True}}],
    "encode: channel": [{"cache.encode": {"keys": KEYS, **SMALL}}],
    "encode: token": [{"cache.encode": {"keys": VALUES, "values": VALUES, **SMALL}}],
    "tier: score": [SCORE, PROMPTED, {"cache.tier": {"tiers": [{"share": 0.5, "values": VALUES}]}}],
    "tier: age": [
        {"cache.encode": {"values": VALUES, **SMALL}},
        {"cache.tier": {"hold": 32, "tiers": [{"values": VALUES}]}},
    ],
    "predict": [
        {"cache.transform": {}},
        {"cache.encode": {"keys": VALUES, "values": VALUES, **SMALL}},
        "cache.predict",
    ],
    "retrieve: pages": [{"cache.retrieve": {"by": "pages", "budget": 32, "dense_layers": 1, **SMALL}}],
    "retrieve: scan": [{"cache.retrieve": {"by": "scan", "budget": 32, "dense_layers": 1, **SMALL}}],
    "retrieve: reuse": [{"cache.retrieve": {"by": "reuse", "layers": [0], "budget": 32, "dense_layers": 0, **SMALL}}],
    "estimate": [{"cache.estimate": {"values": 16, "clusters": 1, "samples": 8, **SMALL}}],
    "code": [{"cache.code": {}}],
    "edit": [{"cache.edit": {}}],
    "parallel": [{"cache.parallel": {}}],
    "hyper": [{"attention.hyper": {"block": 16, "sample": 16, "min_seq_len": 32}}],
    "recycle": [{"decode.recycle": {"width": 4, "nodes": 5}}],
}


@dataclass(frozen=True)
class Verdict:
    """What came of one pass behind another: `refused` says why, else `kl` and what was found wrong, if anything."""

    first: str
    then: str
    refused: str = ""
    kl: float = 0.0
    wrong: str = ""


def tried(program: Program, first: str, then: str, tokens: torch.Tensor, dense: torch.Tensor) -> Verdict:
    """The verdict on a pair; `program` has a dense cache, `dense` are its logits behind a prompt of PROMPT tokens."""
    made = program.fork()
    shared = [step for step in CASES[then] if step not in CASES[first] or then == first]
    for step in [*CASES[first], *shared]:
        pass_ = _pass(step)
        reasons = list(pass_.requires(made))
        if reasons:
            return Verdict(first, then, refused=reasons[0])
        pass_.apply(made, Samples(tokens))
    got = replay(made, tokens, PROMPT, 1)
    kl = compare(dense, got).kl
    wrong = "; ".join(_faults(made, tokens, got))
    return Verdict(first, then, kl=kl, wrong=wrong)


def _faults(program: Program, tokens: torch.Tensor, got: torch.Tensor) -> Iterator[str]:
    if not bool(got.isfinite().all()):
        yield "logits are not finite"
    error = (replay(program, tokens, PROMPT, 4) - got).abs().max() / got.abs().max()
    if error > 1e-4:
        yield f"steps of four tokens give other logits, by {error:.1e}"
    assert program.cache is not None
    cache = Cache(program.cache, 1, PROMPT)
    positions = torch.arange(PROMPT)[None]
    cache.begin(positions)
    interpret(program, {"tokens": tokens[:1, :PROMPT], "positions": positions}, cache)
    cache.commit([list(range(PROMPT))])
    cache.end_prefill()
    if 8 * cache.nbytes().used != int(program.cache.bits(PROMPT)):
        yield f"{cache.nbytes().used} bytes are stored, the formula says {int(program.cache.bits(PROMPT)) // 8}"


def _pass(step: Mapping[str, Any] | str) -> Pass:
    recipe = load({"name": "tried", "family": "cache", "does": "Tries a pair.", "steps": [step]}, catalogue())
    return recipe.steps[0].pass_


def model() -> Program:
    """A random llama of two layers with a dense float32 cache."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in llama.parameters():  # as they are initialised, logits would be flat
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) * 0.15
    program = capture(llama)
    _pass({"cache.insert": {"dtype": "float32"}}).apply(program, None)
    return program


def table() -> Iterator[Verdict]:
    """Every pair in turn."""
    program = model()
    tokens = torch.randint(0, 64, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    dense = replay(program, tokens, PROMPT, 1)
    for first in CASES:
        for then in CASES:
            try:
                yield tried(program, first, then, tokens, dense)
            except SmeltError as error:
                yield Verdict(first, then, refused=f"when it runs: {error}")


def text(verdicts: Sequence[Verdict]) -> str:
    """The table in Markdown: KL where a pair is legal, a number where it is refused, and the reasons below."""
    reasons: dict[str, int] = {}
    cells = {}
    for v in verdicts:
        if v.refused:
            cells[v.first, v.then] = f"[{reasons.setdefault(v.refused, len(reasons) + 1)}]"
        else:
            cells[v.first, v.then] = f"{v.kl:.1e}" + (" **wrong**" if v.wrong else "")
    names = list(CASES)
    lines = ["| first ↓ then → | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| **{first}** | " + " | ".join(cells[first, then] for then in names) + " |" for first in names]
    legal = sum(not v.refused for v in verdicts)
    head = (
        "# Passes over the cache, one behind the other\n\n"
        f"{legal} of {len(verdicts)} pairs are legal. Numbers are KLs to the dense cache, in nats, of a random model "
        "of two layers; brackets point to the reason below. Written by `python benchmarks/interactions.py --write`.\n"
    )
    return "\n".join([head, *lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/interactions.md")
    asked = parser.parse_args()
    verdicts = list(table())
    for v in verdicts:
        if v.wrong:
            print(f"{v.first}, then {v.then}: {v.wrong}")
    if asked.write:
        Path(__file__).with_name("results").joinpath("interactions.md").write_text(text(verdicts), encoding="utf-8")
    else:
        print(text(verdicts))


if __name__ == "__main__":
    main()
