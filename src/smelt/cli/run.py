"""`smelt run`: continue a prompt with an artefact, as the tokens are decided."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Base, check_target
from .show import note, size, waiting

if TYPE_CHECKING:
    from ..model import Compiled
    from ..runtime.text import Stream
    from ..runtime.writer import Writer

USUAL = 256


def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artefact.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to make; default: 256, or what the context leaves.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. This and what follows: by default the recipe's.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this mass; 1 is off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, relative to the likeliest; 0 is off.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Mass of the most typical tokens; 1 is off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: less of what stands already.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File of a JSON schema that the answer follows.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the answer matches.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="File of a grammar in Lark's syntax, for the answer.")] = None,
    constrain: Annotated[
        str | None, typer.Option(help="How it is held to any of these: mask, align or reject; default: the recipe's.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another prompt, from which an artefact that contrasts prompts moves away.")
    ] = None,
    no_speculation: Annotated[
        bool, typer.Option("--no-speculation", help="One token a step; the text is the same.")
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="PROMPT and what is printed are token ids: 1,2,3.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and steps to stderr.")] = False,
    base: Base = None,
    target: Annotated[
        str, typer.Option(help="cpp: generated kernels; triton: those for GPUs; torch: the reference.")
    ] = "cpp",
) -> None:
    """Continue PROMPT with an artefact, streaming.

    \b
    smelt run out.smelt "def fib(n):"
    smelt run out.smelt - < prompt.txt --temperature 0.8 --top-p 0.95 --seed 7
    smelt run out.smelt "import os" --stop "\\n\\n" --stats
    smelt run out.smelt "version = " --regex "[0-9]+[.][0-9]+"
    """
    with waiting(f"loading {out}") as line:
        from .. import load

        check_target(target)
        compiled = load(out, target, base=base)  # type: ignore[arg-type]  # checked
        check_decoder(compiled)
        text = sys.stdin.read() if prompt == "-" else prompt
        asked = _ids(text) if ids else compiled.tokenizer.encode(text)
        options: dict[str, Any] = {
            "max_new_tokens": _room(compiled, asked) if max_new_tokens is None else max_new_tokens,
            "seed": seed,
            "stop": tuple(stop or ()),
            "speculate": not no_speculation,
            "json_schema": _text(json_schema),
            "regex": regex,
            "grammar": _text(grammar),
            "constrain": constrain,
            "against": _ids(against) if ids and against is not None else against,
        }
        shaping = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
        }
        options |= {name: value for name, value in shaping.items() if value is not None}
        line.say("reading the prompt")
        start = time.perf_counter()
        decoding, streams, _ = compiled._start([asked], options)
        pieces = _pieces(decoding, streams[0] if streams else None, ids)
        first = next(pieces)
    ready = time.perf_counter()
    _write(first)
    for piece in pieces:
        _write(piece)
    end = time.perf_counter()
    _write("\n")
    if stats:
        _tell(compiled, decoding, ready - start, end - ready)


def check_decoder(compiled: Compiled) -> None:
    """Raises SmeltError for an artefact that cannot generate."""
    from ..ir.errors import SmeltError

    if compiled.program.cache is None:
        raise SmeltError(
            f"{compiled.program.name} has no cache, so it cannot generate; load it and call `run` on inputs"
        )


def _text(path: Path | None) -> str | None:
    from ..ir.errors import SmeltError

    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise SmeltError(f"{path}: cannot be read ({fault})") from fault


def _pieces(decoding: Writer, stream: Stream | None, ids: bool) -> Iterator[str]:
    """What to print, as it is decided; at least one piece, which may be empty."""
    shown = ""
    for _, tokens in decoding.run():
        text = stream.push(tokens) if stream else ""
        if stream and stream.stopped is not None:
            decoding.stop(0)
        if ids:
            text, shown = shown + ",".join(map(str, tokens)), ","
        yield text
    yield "" if ids or stream is None else stream.finish()


def _room(compiled: Compiled, prompt: list[int]) -> int:
    """New tokens where nobody says how many."""
    return max(1, min(USUAL, compiled.context + 1 - compiled.ahead - len(prompt)))


def _ids(text: str) -> list[int]:
    from ..ir.errors import SmeltError

    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise SmeltError("--ids: the prompt must be whole numbers such as 1,2,3") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(compiled: Compiled, decoding: Writer, prefill: float, decode: float) -> None:
    row, counts, used = decoding.rows[0], decoding.counts, decoding.session.cache.nbytes().used
    note(f"{len(row.prompt)} tokens of prompt and the first new one in {prefill:.2f} s")
    if counts.steps:
        rate, each = counts.tokens / decode, counts.tokens / counts.steps
        note(f"{counts.tokens} tokens in {decode:.2f} s: {rate:.1f} a second, {each:.2f} a step; ended by {row.reason}")
    note(f"{size(compiled.program.nbytes)} of weights, {size(used)} of cache")
