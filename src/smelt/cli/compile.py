"""`smelt compile`: a model and a recipe become an artefact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import check_output, check_target
from .show import columns, emit, note, size, waiting

if TYPE_CHECKING:
    from ..model import Compiled
    from ..passes.bisect import Bisection
    from ..passes.events import Event
    from ..recipes import Recipe


def compile_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or hub id of a transformers model.")],
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe by name, or a YAML file.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the artefact.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file for steps that look at data.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Text file for steps that train; else the calibration text.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder where trainings leave their state and take it up again."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Change an option: cache.encode.tail=128.")
    ] = None,
    print_after: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Print the graph behind a step.")
    ] = None,
    stop_after: Annotated[str | None, typer.Option(metavar="STEP", help="Leave out the steps behind this one.")] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the step and the sites that hurt most; writes nothing.")
    ] = False,
    max_kl: Annotated[float, typer.Option(help="KL in nats beyond which --bisect calls a step guilty.")] = 0.05,
    draft: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Artefact of a smaller model, which drafts where the recipe asks."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model or artefact that MODEL was fine-tuned from: weights.residual."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="cpp: generated kernels; triton: those for GPUs; torch: the reference.")
    ] = "cpp",
    no_fallback: Annotated[
        bool, typer.Option("--no-fallback", help="Refuse what the target has no fast kernel for.")
    ] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write the last good graph of a failed compile to OUT.failed.txt.")
    ] = False,
    huffman: Annotated[
        bool, typer.Option("--huffman", help="Code tensors on disk, bit for bit: a smaller OUT that loads slower.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compile MODEL by RECIPE and write an artefact.

    \b
    smelt compile ./llama finequant -o llama.smelt
    smelt compile ./llama all-four -o llama.smelt --calibration text.txt
    smelt compile ./llama ./mine.yaml -o out.smelt --set cache.encode.tail=128
    smelt compile ./llama medusa-heads -o fast.smelt --train corpus.txt --checkpoints ./training
    smelt compile ./llama all-four --calibration text.txt --bisect
    """
    with waiting("loading", quiet=bool(os.environ.get("SMELT_DEBUG"))) as line:
        from .. import debug
        from ..ir.errors import SmeltError

        debug.level()  # refuses what is no level
        check_target(target)
        if out is None and not bisect:
            raise SmeltError("nowhere to write: name a folder with -o OUT")
        if out is not None:
            check_output(out)
        resolved = _recipe(recipe, settings or [], print_after or [], stop_after, calibration, train, checkpoints)
        line.say(f"capturing {model}")
        graphs: list[tuple[str, str]] = []
        if out is None or bisect:
            found = _bisect(model, resolved, calibration, train, checkpoints, stop_after, max_kl, line.tell)
        else:
            compiled = _write(
                out, model, resolved, calibration, train, checkpoints, stop_after, target, no_fallback,
                _listener(line.tell, print_after or [], graphs), keep_failed, bool(print_after or debug.level()),
                draft, base, huffman,
            )  # fmt: skip
    if out is None or bisect:
        _tell_bisection(found, json)
    else:
        _tell(compiled, out, graphs, json)


def _recipe(
    recipe: str,
    settings: list[str],
    print_after: list[str],
    stop_after: str | None,
    calibration: Path | None,
    train: Path | None,
    checkpoints: Path | None,
) -> Recipe:
    """The resolved recipe; whatever can be told to be wrong before the model is read is told here."""
    from ..ir.errors import SmeltError, nearest
    from ..passes import catalogue
    from ..recipes import load

    resolved = load(recipe, catalogue(), settings)
    names = [step.name for step in resolved.steps]
    for name in (*print_after, *([stop_after] if stop_after else [])):
        if name not in names:
            raise SmeltError(f"no step is named '{name}'{nearest(name, names)}; steps: {', '.join(names)}")
    for option, text in (("--calibration", calibration), ("--train", train)):
        if text is not None and not text.is_file():
            raise SmeltError(f"{text}: no such file; {option} takes a text file")
    trains = any(step.pass_name.startswith("train.") for step in resolved.steps)
    if not trains and (train is not None or checkpoints is not None):
        raise SmeltError(f"the recipe {resolved.name} trains nothing: leave out --train and --checkpoints")
    if calibration is None and train is None and resolved.needs.calibration != "none":
        verb, option = ("trains", "--train FILE or --calibration") if trains else ("calibrates", "--calibration")
        raise SmeltError(f"the recipe {resolved.name} {verb} on sample texts: give some with {option} FILE")
    return resolved


def _write(
    out: Path,
    model: str,
    recipe: Recipe,
    calibration: Path | None,
    train: Path | None,
    checkpoints: Path | None,
    stop_after: str | None,
    target: str,
    no_fallback: bool,
    listen: Callable[[Event], None],
    keep_failed: bool,
    anew: bool,
    draft: Path | None,
    base: str | None,
    huffman: bool,
) -> Compiled:
    """Compile and save; `anew`: steps are to be seen, so that they must run."""
    from .. import debug
    from ..compiler import compile as compile_model
    from ..ir.errors import SmeltError

    with _last_graph(Path(f"{out}.failed.txt") if keep_failed else None):
        compiled = compile_model(
            model, recipe, calibration=calibration, train=train, checkpoints=checkpoints,
            target=target, fallback=not no_fallback,  # type: ignore[arg-type]
            listen=listen, stop_after=stop_after, anew=anew, draft=draft, base=base,
        )  # fmt: skip
    debug.tell_kernels(compiled.plan)
    try:
        compiled.save(out, huffman=huffman)
    except OSError as fault:
        raise SmeltError(f"{out}: cannot be written ({fault.strerror}); nothing was left behind") from fault
    compiled.build()
    return compiled


def _listener(
    follow: Callable[[Event], None], print_after: list[str], graphs: list[tuple[str, str]]
) -> Callable[[Event], None]:
    """Follows a compile; the graphs that were asked for are printed later, when no line moves any more."""
    from .. import debug
    from ..ir.text import print_program
    from ..passes.events import StepDone, StepRolledBack

    def listen(event: Event) -> None:
        follow(event)
        debug.tell(event)
        if isinstance(event, StepDone | StepRolledBack) and event.report.name in print_after:
            graphs.append((event.report.name, print_program(event.program)))

    return listen


@contextmanager
def _last_graph(place: Path | None) -> Iterator[None]:
    """A step that fails leaves the graph before it, at `place` or where temporary files go."""
    from ..ir.errors import SmeltError
    from ..ir.text import print_program
    from ..passes.manager import StepFailed

    try:
        yield
    except StepFailed as fault:
        if place is None:
            place = Path(tempfile.mkdtemp(prefix="smelt-failed-")) / "graph.txt"
        place.write_text(print_program(fault.program, hashes=False))
        raise SmeltError(f"{fault} (the last good graph: {place})") from fault


def _bisect(
    model: str,
    recipe: Recipe,
    calibration: Path | None,
    train: Path | None,
    checkpoints: Path | None,
    stop_after: str | None,
    max_kl: float,
    listen: Callable[[Event], None],
) -> Bisection:
    from ..assets import model_assets
    from ..ir.capture import capture
    from ..ir.shapes import derive
    from ..passes.bisect import bisect
    from ..samples import samples

    program = capture(model)
    derive(program)
    given = samples(calibration, train, model_assets(model).folder, program.facts, checkpoints)
    names = [step.name for step in recipe.steps]
    steps = recipe.steps[: names.index(stop_after) + 1] if stop_after else recipe.steps
    return bisect(program, steps, given, max_kl, listen)


def _tell_bisection(found: Bisection, json: bool) -> None:
    if not json:
        print(found)
        return
    guilty = vars(found.guilty) if found.guilty else None
    steps, sites = ([vars(each) for each in members] for members in (found.steps, found.sites))
    emit({"max_kl": found.max_kl, "steps": steps, "guilty": guilty, "sites": sites, "note": found.note})


def _tell(compiled: Compiled, out: Path, graphs: list[tuple[str, str]], json: bool) -> None:
    written = sum(path.stat().st_size for path in out.iterdir())
    kernels = compiled.kernels
    slow = [row for row in kernels if row["fallback"]]
    capacity = [row for row in kernels if row["role"] == "capacity" and not row["fallback"]]
    assert compiled.report is not None
    if json:
        emit(
            {
                "artefact": str(out),
                "bytes": written,
                "recipe": compiled.facts["recipe"],
                "report": compiled.report.to_dict(),
                "fallbacks": [{"node": row["node"], "why": row["why"]} for row in slow],
                "capacity": [{"node": row["node"], "why": row["why"]} for row in capacity],
                "graphs": dict(graphs),
            }
        )
        return
    for name, graph in graphs:
        print(f"# behind {name}\n{graph}")
    print(compiled.report)
    print(f"{out}: {size(written)}")
    for rows, what in ((slow, "run as torch ops"), (capacity, "save memory but no time")):
        if rows:
            note(f"no fast kernel for {len(rows)} nodes, which {what} (--no-fallback refuses them):")
            note(columns([(row["node"], row["why"]) for row in rows[:5]], indent="  "))
