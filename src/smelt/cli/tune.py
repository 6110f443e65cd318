"""`smelt tune`: measures how many tokens a step should draft on this machine, and writes it into the artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Base
from .run import check_decoder
from .show import columns, emit, waiting
from .verify import read_text


def tune(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artefact that drafts.")],
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text like what will be asked; default: the standard library.")
    ] = None,
    base: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit speculation to this machine.

    Tries trees of many sizes on pieces of the text, greedy and at temperature 1, and keeps the fastest of each in OUT;
    0 stands for no speculation. What is generated stays the same.

    \b
    smelt tune out.smelt
    smelt tune out.smelt --text prompts.txt
    """
    with waiting(f"loading {out}") as line:
        from ..model import load
        from ..tune import tune as fit

        compiled = load(out, base=base)
        check_decoder(compiled)
        prompts = read_text(compiled, text).prompts
        found = fit(compiled, prompts, lambda now, total: line.say("measuring", now, total))
        compiled.save(out)
    if json:
        emit({"artefact": str(out), **{name: tuning.to_dict() for name, tuning in found.items()}})
        return
    rows = [
        (f"{size}", *(f"{t.rates[size]:.0f}{' *' if size == t.best else ''}" for t in found.values()))
        for size in next(iter(found.values())).rates
    ]
    print(columns([("drafted tokens", *(f"{name}, tokens/s" for name in found)), *rows]))
    print("* kept")
