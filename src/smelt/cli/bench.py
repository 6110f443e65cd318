"""`smelt bench`: how fast an artefact generates, and how that compares to another in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Base
from .run import check_decoder
from .show import columns, emit, size, waiting
from .verify import read_text

if TYPE_CHECKING:
    from ..model import Compiled
    from ..speed import Runner, Spread, Timing

KINDS = ("hf", "smelt")


def bench(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artefact.")],
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="KIND WHAT", help="hf MODEL: transformers, eager, bfloat16; smelt OUT: an artefact."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to make for each.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How often each prompt is asked.")] = 3,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Where prompts are taken from.")] = None,
    base: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time OUT, alone or against another.

    Greedy requests, one at a time; medians with quartiles. What is compared takes turns in one run.

    \b
    smelt bench out.smelt
    smelt bench out.smelt --against hf ./llama
    smelt bench out.smelt --against smelt plain.smelt --new-tokens 256
    """
    with waiting(f"loading {out}") as line:
        from .. import load
        from ..ir.errors import SmeltError
        from ..speed import compiled_runner, race

        if against and against[0] not in KINDS:
            raise SmeltError(f"--against {' '.join(against)}: say `hf MODEL` or `smelt OUT`")
        compiled = load(out, base=base)
        check_decoder(compiled)
        if prompt_tokens + new_tokens > compiled.context:
            raise SmeltError(f"{prompt_tokens} + {new_tokens} tokens exceed the model's context of {compiled.context}")
        asked = _prompts(compiled, text, prompts, prompt_tokens)
        runners: dict[str, Runner] = {"smelt": compiled_runner(compiled)}
        if compiled.program.decode is not None:
            runners["smelt, no speculation"] = compiled_runner(compiled, speculate=False)
        sizes = {name: _sizes(compiled, prompt_tokens + new_tokens) for name in runners}
        if against:
            line.say(f"loading {against[1]}")
            label, runner, weights = _other(*against)
            runners[label], sizes[label] = runner, weights
        line.say("measuring")
        timings = race(runners, asked, new_tokens, rounds, lambda done, total: line.say("measuring", done, total))
    rows = _rows(timings, sizes)
    if json:
        emit({"artefact": str(out), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rows": rows})
    else:
        _tell(rows)


def _prompts(compiled: Compiled, text: Path | None, count: int, length: int) -> list[list[int]]:
    """Pieces of a text at even distances, or random tokens for a model without a tokenizer."""
    import torch

    if compiled.assets.folder is None:
        random = torch.Generator().manual_seed(0)
        vocabulary = int(compiled.program.facts["vocabulary"])
        drawn: list[list[int]] = torch.randint(vocabulary, (count, length), generator=random).tolist()
        return drawn
    flat = read_text(compiled, text).windows.flatten()
    flat = flat.repeat(-(-length // len(flat)))
    stride = (len(flat) - length) // max(1, count - 1)
    return [flat[i * stride : i * stride + length].tolist() for i in range(count)]


def _sizes(compiled: Compiled, length: int) -> dict[str, int]:
    from ..ir.cache import Cache

    assert compiled.program.cache is not None
    nodes = 1 + compiled.program.decode.draft.most if compiled.program.decode else 1
    cache = Cache(compiled.program.cache, 1, length, scratch=nodes)
    cache.end_prefill()
    return {"weight_bytes": compiled.program.nbytes, "cache_bytes": cache.nbytes().allocated}


def _other(kind: str, what: str) -> tuple[str, Runner, dict[str, int]]:
    from .. import load
    from ..speed import compiled_runner, transformers_model, transformers_runner

    if kind == "smelt":
        compiled = load(what)
        check_decoder(compiled)
        return what, compiled_runner(compiled), {"weight_bytes": compiled.program.nbytes}
    model = transformers_model(what)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return "transformers", transformers_runner(model), {"weight_bytes": held}


def _rows(timings: Mapping[str, Sequence[Timing]], sizes: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    from ..speed import decode_rate, per_step, prefill_rate, ratio

    first, *_ = timings
    return [
        {
            "name": name,
            "decode_tokens_per_second": decode_rate(taken)._asdict(),
            "prefill_tokens_per_second": prefill_rate(taken)._asdict(),
            "tokens_per_step": per_step(taken),
            "smelt_is_times_as_fast": ratio(timings[first], taken)._asdict() if name != first else None,
            **sizes[name],
        }
        for name, taken in timings.items()
    ]


def _tell(rows: Sequence[Mapping[str, Any]]) -> None:
    from ..speed import Spread

    def shown(told: Mapping[str, float] | None, digits: int) -> str:
        if told is None:
            return ""
        s: Spread = Spread(**told)
        return f"{s.median:.{digits}f} ({s.low:.{digits}f} to {s.high:.{digits}f})"

    header = ("", "decode tokens/s", "prefill tokens/s", "tokens a step", "weights", "cache", "smelt against it")
    body = [
        (
            row["name"],
            shown(row["decode_tokens_per_second"], 1),
            shown(row["prefill_tokens_per_second"], 0),
            f"{row['tokens_per_step']:.2f}",
            size(row["weight_bytes"]),
            size(row["cache_bytes"]) if "cache_bytes" in row else "",
            f"× {shown(row['smelt_is_times_as_fast'], 2)}" if row["smelt_is_times_as_fast"] else "",
        )
        for row in rows
    ]
    print(columns([header, *body]))
    print("median (first to third quartile)")
