"""`smelt inspect`: what a model or an artefact holds, what a step costs, and which kernel runs each node."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Base, check_target
from .show import columns, emit, number, size, waiting

if TYPE_CHECKING:
    from ..codegen.plan import Plan
    from ..ir.cost import Costs
    from ..ir.decode import DecodePlan
    from ..ir.program import Program
    from ..runtime.profile import Timing

CONTEXT = 1024  # tokens at which a cache is told in numbers


def inspect_(
    what: Annotated[str, typer.Argument(metavar="MODEL|OUT", help="A model's folder or hub id, or an artefact.")],
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph as text.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the kernel of each node and why.")] = False,
    tokens: Annotated[int, typer.Option(min=0, help="New tokens of the step that --kernels times; 0: none.")] = 1,
    target: Annotated[str, typer.Option(help="Whose kernels: cpp, triton or torch.")] = "cpp",
    base: Base = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show sizes, costs, graph and kernels.

    Costs are those of a step of B rows and T new tokens behind S tokens of context.

    \b
    smelt inspect ./llama
    smelt inspect out.smelt --kernels
    smelt inspect out.smelt --graph > graph.txt
    """
    check_target(target)
    with waiting(f"loading {what}"):
        from ..codegen.lower import lower
        from ..ir.cost import cost
        from ..ir.text import print_program

        program, manifest = _read(what, base)
        known = {"recipe": (manifest.get("recipe") or {}).get("name"), "certificate": manifest.get("certificate")}
        told = {**_sizes(program), **_disk(Path(what), manifest), **known, "cost": _formulas(cost(program))}
        if program.facts.get("kind") == "decoder":
            told["cost_of_a_token"] = cost(program).evaluate(B=1, T=1, S=CONTEXT)._asdict()
        plan = lower(program.merged(), target) if kernels else None  # type: ignore[arg-type]  # checked above
        text = print_program(program) if graph else ""
        taken = _timings(plan, tokens) if plan else []
    if json:
        measured = {"kernels": plan.kernels(), "timings": [vars(row) for row in taken]} if plan else {}
        emit({**told, **measured, **({"graph": text} if graph else {})})
        return
    if graph and not kernels:
        print(text, end="")
        return
    _tell(told)
    if plan is not None:
        _tell_kernels(plan)
        _tell_timings(taken, tokens)
    if graph:
        print(text, end="")


def _read(what: str, base: str | None) -> tuple[Program, dict[str, Any]]:
    """The program, and the manifest of an artefact."""
    from ..ir.capture import capture
    from ..ir.shapes import derive
    from ..model import base_program
    from ..runtime import artefact

    if (Path(what) / artefact.MANIFEST).is_file():
        return artefact.load(Path(what), None if base is None else base_program(base))
    program = capture(what)
    derive(program)
    return program, {}


def _sizes(program: Program) -> dict[str, Any]:
    by_encoding: dict[str, dict[str, int]] = {}
    for weight in program.weights.values():
        row = by_encoding.setdefault(str(weight.encoding), {"weights": 0, "values": 0, "bytes": 0})
        row["weights"] += 1
        row["values"] += math.prod(weight.shape)
        row["bytes"] += weight.nbytes
    cache = program.cache
    return {
        "name": program.name,
        "facts": program.facts,
        "steps": [record.name for record in program.history],
        "parameters": sum(row["values"] for row in by_encoding.values()),
        "weight_bytes": program.nbytes,
        "weights": by_encoding,
        "ops": dict(Counter(_op(node) for node in program.graph.nodes if node.op == "call_function")),
        "cache_bits_per_value": None if cache is None else float(cache.bits_per_value(CONTEXT)),
        "cache_bytes": None if cache is None else math.ceil(float(cache.bits(CONTEXT)) / 8),
        "cache": None if cache is None else cache.to_dict(),
        "decode": None if program.decode is None else program.decode.to_dict(),
        "choice": None if program.choice is None else program.choice.to_dict(),
        "depth": None if program.depth is None else _stages(program),
        "drafted": None if program.decode is None else _drafted(program.decode),
        "draft": None if program.draft is None else {"name": program.draft.name, "bytes": _own(program)},
    }


def _disk(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the files of an artefact take, and how their tensors are coded."""
    from ..runtime.artefact import DISK

    if not manifest:
        return {"disk_bytes": None, "disk_coding": None}
    coded = [told["coding"] for told in manifest.get(DISK, {}).values()]
    return {
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "disk_coding": coded[0] if coded else None,
    }


def _drafted(plan: DecodePlan) -> str:
    from ..ir.decode.draft import kind

    law = {"exact": "exact", "bounded": "with a bound", "unbounded": "not the model's law"}[plan.accept.law]
    return f"{' and '.join(map(kind, plan.draft.parts))}, {plan.draft.most} tokens a step at most, {law}"


def _stages(program: Program) -> dict[str, int]:
    """Bytes of the weights that a step reads, by the generated token from which on it does."""
    from ..ir.blocks import stages

    starts = [stage.start for stage in program.depth.stages] if program.depth is not None else []
    read = [sum(weight.nbytes for weight in shallow.weights.values()) for shallow in stages(program)]
    return {str(start): nbytes for start, nbytes in zip(starts, read, strict=True)}


def _own(program: Program) -> int:
    """Bytes of a draft model's weights that the model does not share."""
    return program.nbytes - sum(weight.nbytes for weight in program.weights.values())


def _op(node: Any) -> str:
    from ..ir.targets import target_name

    return target_name(node.target)


def _formulas(costs: Costs) -> dict[str, str]:
    import sympy

    whole = {
        "flops": costs.flops,
        "weight_bytes": costs.weight_bytes,
        "cache_bytes": costs.cache_bytes,
        "activation_bytes": costs.activation_bytes,
    }
    return {name: str(sympy.collect(sympy.expand(formula), sympy.symbols("B T S"))) for name, formula in whole.items()}


def _tell(told: dict[str, Any]) -> None:
    facts = told["facts"]
    known = [
        ("kind", "kind"),
        ("family", "family"),
        ("source", "source"),
        ("context", "context"),
        ("vocabulary", "vocabulary"),
    ]
    rows = [(label, str(facts[key])) for label, key in known if facts.get(key) is not None]
    print(columns([("name", told["name"]), *rows]))
    if told["recipe"]:
        print(f"recipe {told['recipe']}: {', '.join(told['steps'])}")
    disk = "" if told["disk_bytes"] is None else f", {size(told['disk_bytes'])} with all else on disk"
    coding = f" ({told['disk_coding']})" if told["disk_coding"] else ""
    print(f"\nweights: {told['parameters']:,} values in {size(told['weight_bytes'])}{disk}{coding}")
    each = [
        (encoding, f"{row['weights']} weights", f"{row['values']:,} values", size(row["bytes"]), _bits(row))
        for encoding, row in told["weights"].items()
    ]
    print(columns([("encoding", "", "", "", ""), *each][1:], indent="  "))
    if told["cache"] is not None:
        bits = number(told["cache_bits_per_value"])
        print(f"cache: {bits} bits a value, {size(told['cache_bytes'])} at {CONTEXT} tokens")
    if told["decode"] is not None:
        print(f"speculation: {told['drafted']}")
    if told["choice"] is not None:
        print(f"choice: {_chosen(told['choice'])}")
    if told["depth"] is not None:
        stages = [f"from token {start} on {size(nbytes)}" for start, nbytes in told["depth"].items()]
        print(f"weights that a step reads: {', '.join(stages)}")
    if told["certificate"] is not None:
        proved = told["certificate"]
        print(f"certificate: {proved['equal']} of {proved['asked']} requests equal plain decoding ({proved['date']})")
    if told["draft"] is not None:
        print(f"draft model: {told['draft']['name']}, {size(told['draft']['bytes'])} of its own")
    print("\ncost of a step with B rows, T new tokens, S tokens of context")
    print(columns(list(told["cost"].items()), indent="  "))
    if "cost_of_a_token" in told:
        work = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in told["cost_of_a_token"].items())
        print(f"  one token at {CONTEXT}: {work}")


def _chosen(choice: dict[str, Any]) -> str:
    """`contrastive search (candidates 4, alpha 0.6), temperature 1 by default`."""
    preset = ", ".join(f"{name} {value:g}" for name, value in choice.get("preset", {}).items())
    search = dict(choice.get("search", {}))
    parts = []
    if name := search.pop("kind", ""):
        shown = ", ".join(f"{key} {value}" for key, value in search.items() if not isinstance(value, list))
        parts.append(f"{name} search ({shown})")
    if held := choice.get("constrain"):
        parts.append(f"grammars by {held}")
    return ", ".join([*parts, *([f"{preset} by default"] if preset else [])])


def _bits(row: dict[str, int]) -> str:
    return f"{8 * row['bytes'] / max(1, row['values']):.3g} bits a value"


def _tell_kernels(plan: Plan) -> None:
    rows = [(r["node"], r["kernel"], "fallback" if r["fallback"] else r["role"], r["why"]) for r in plan.kernels()]
    print("\n" + columns([("node", "kernel", "role", "why"), *rows]))


def _timings(plan: Plan, tokens: int) -> list[Timing]:
    """Of a step of a decoder on generated kernels; nothing else has a step to time."""
    from ..runtime.profile import profile

    if not tokens or plan.target != "cpp" or plan.program.cache is None:
        return []
    context = int(plan.program.facts.get("context") or CONTEXT)
    return profile(plan, tokens, max(1, min(128, context - tokens)))


def _tell_timings(rows: list[Timing], tokens: int) -> None:
    if not rows:
        return
    head = ("kernel", "calls", "ms", "MB", "of bandwidth")
    cells = [
        (r.kernel, str(r.calls), f"{1e3 * r.seconds:.3f}", f"{r.nbytes / 1e6:.2f}" if r.nbytes else "",
         f"{100 * r.share:.0f} %" if r.share is not None else "")
        for r in rows
    ]  # fmt: skip
    total = sum(row.seconds for row in rows)
    print(f"\na step of {tokens} token{'s' if tokens > 1 else ''}: {1e3 * total:.2f} ms")
    print(columns([head, *cells]))
