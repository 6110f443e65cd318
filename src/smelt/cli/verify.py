"""`smelt verify`: measures again what an artefact's recipe promises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Base
from .run import check_decoder
from .show import columns, emit, number, waiting

if TYPE_CHECKING:
    from ..model import Compiled
    from ..quality import Source
    from ..texts import Text

BROKEN = 1


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artefact.")],
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was made from; the bundled one is known.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out text; default: files of the standard library.")
    ] = None,
    no_certificate: Annotated[bool, typer.Option("--no-certificate", help="Leave OUT as it is.")] = False,
    base: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what OUT promises once more.

    On this machine, through the built kernels. What was proved of speculation is written into the manifest of OUT, with
    the hashes of what it was proved of. The exit code is 1 if a promise is broken.

    \b
    smelt verify out.smelt
    smelt verify out.smelt --source ./llama --text heldout.txt
    """
    with waiting(f"loading {out}") as line:
        from .. import reference_model
        from ..model import load
        from ..quality import Meter
        from ..runtime.artefact import certify
        from ..verify import certificate, is_reference
        from ..verify import verify as checks

        compiled = load(out, base=base)
        check_decoder(compiled)
        held_out = read_text(compiled, text)
        line.say("capturing the source model")
        model = source or (str(reference_model()) if is_reference(compiled) else None)
        plain = None if model is None else _source(model, held_out, compiled)
        meter = Meter(compiled, held_out, plain, out, done=lambda metric: line.say(f"measuring {metric}"))
        found = list(checks(meter))
        proved = None if no_certificate else certificate(meter)
        if proved is not None:
            certify(out, proved)
    if json:
        emit({"artefact": str(out), "holds": _holds([c.status for c in found]), "checks": [c.to_dict() for c in found]})
    else:
        rows = [(check.metric, check.promise, number(check.value), check.status, check.note) for check in found]
        print(columns([("metric", "promise", "measured", "", "note"), *rows]))
    if not _holds([check.status for check in found]):
        raise typer.Exit(BROKEN)


def read_text(compiled: Compiled, path: Path | None) -> Text:
    """Held-out text as this model's tokens."""
    from ..ir.errors import SmeltError
    from ..texts import Text, held_out_text

    if path is None:
        text = held_out_text()
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise SmeltError(f"{path}: cannot be read as UTF-8 text ({fault})") from fault
    tokens = compiled.tokenizer.encode(text)
    return Text(tokens, int(compiled.program.facts["vocabulary"]), compiled.context)


def _source(model: str, text: Text, compiled: Compiled) -> Source:
    from ..compiler import compile as compile_model
    from ..ir.errors import SmeltError
    from ..quality import Source

    plain = compile_model(model, "none")
    for fact in ("family", "vocabulary", "hidden", "context"):
        if plain.program.facts.get(fact) != compiled.program.facts.get(fact):
            raise SmeltError(
                f"--source {model}: its {fact} is {plain.program.facts.get(fact)}, the artefact's "
                f"{compiled.program.facts.get(fact)}: it was not made from this model"
            )
    return Source(plain, text)


def _holds(states: list[str]) -> bool:
    return "broken" not in states
