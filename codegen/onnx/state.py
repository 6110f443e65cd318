"""The cache of a decoder as inputs and outputs of the graph: every segment in the form in which it is stored.

A row's stored tokens are told by `past.lengths` alone; how many of them stand in sink, body and tail follows from it as
in `ir/cache/plan.py`. A site without tail is one buffer `[B, G, capacity, D]`. A site with pages has its dense tokens
`[B, W, G, D]` (sinks first, then the tail), and the parts of encoded pages `[B, P, G, …]`, page p in slot p, or p % P
under a budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.cache import Site
from ...ir.encoding import Affine, Dense, Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from .builder import Builder, Value, onnx_type
from .sizes import size_of

LENGTHS, COUNTS = "lengths", "counts"


def inputs(builder: Builder, program: Program, places: Mapping[str, fx.Node]) -> dict[str, Value]:
    """Inputs `tokens`, `counts`, `past.lengths` and every site's buffers; what the Program's inputs are."""
    if set(places) != {"tokens", "positions"}:
        raise SmeltError(
            f"{program.name}: with its cache a decoder exports that reads tokens and positions, not "
            f"{', '.join(places)}: compile without the step that adds inputs (such as sample.superposed), or run the "
            "artefact with smelt"
        )
    int64 = onnx_type(torch.int64)
    meta = places["tokens"].meta
    tokens = Value(builder.input("tokens", int64, ("B", "T")), meta["shape"], meta["dtype"])
    counts = builder.input(COUNTS, int64, ("B",))
    lengths = builder.input(f"past.{LENGTHS}", int64, ("B",))
    builder.scope = "step"
    across = builder.op(
        "Range",
        builder.const(np.array(0)),
        builder.op("Squeeze", size_of(builder, tokens, 1)),
        builder.const(np.array(1)),
    )
    new = builder.op("Unsqueeze", across, builder.const([0]))  # [1, T]
    real = builder.op("Less", new, builder.op("Unsqueeze", counts, builder.const([1])))
    at = builder.op("Add", builder.op("Unsqueeze", lengths, builder.const([1])), new)
    positions = builder.op("Mul", at, builder.op("Cast", real, to=int64))  # padding stands at 0: tables end somewhere
    after = builder.op("Add", lengths, counts)
    builder.shared["step"] = {"new": new, "positions": positions, "lengths": lengths, "after": after, "tokens": tokens}
    builder.shared["present"] = {LENGTHS: (after, int64, ("B",))}
    assert program.cache is not None
    for site in program.cache.sites:
        for name, (dtype, dims) in buffers(builder, site).items():
            builder.input(f"past.{name}", onnx_type(dtype), dims)
    meta = places["positions"].meta
    return {"tokens": tokens, "positions": Value(positions, meta["shape"], meta["dtype"])}


def outputs(builder: Builder, program: Program) -> None:
    """`present.…` for every `past.…`, of the same type and dims."""
    for name, (value, kind, dims) in builder.shared["present"].items():
        builder.output(f"present.{name}", value, kind, dims)


def buffers(builder: Builder, site: Site) -> dict[str, tuple[torch.dtype, tuple[Any, ...]]]:
    """Type and dims of every buffer of a site, by its name without `past.`."""
    if site.dense == "bfloat16":
        raise SmeltError(
            f"{builder.name}: layer {site.layer} stores bfloat16, which callers in Python cannot hand to a runtime; "
            "compile with cache.insert.dtype=float16"
        )
    if why := beyond(site):
        raise SmeltError(
            f"{builder.name}: the cache of layer {site.layer} {why}, which ONNX graphs of smelt do not: compile "
            "without that step, or run the artefact with smelt"
        )
    dense, heads, lead = getattr(torch, site.dense), site.kv_heads, f"{site.layer}"
    if site.tail is None:
        return {
            f"{lead}.keys": (dense, ("B", heads, "capacity", site.key_dim)),
            f"{lead}.values": (dense, ("B", heads, "capacity", site.value_dim)),
        }
    made: dict[str, tuple[torch.dtype, tuple[Any, ...]]] = {
        f"{lead}.keys.dense": (dense, ("B", width(site), heads, site.key_dim)),
        f"{lead}.values.dense": (dense, ("B", width(site), heads, site.value_dim)),
    }
    if not site.kept:
        return made
    pages = page_dim(builder, site)
    for role, encoding, dim in roles(site):
        for part, (dtype, dims) in parts(builder, site, role, encoding, dim).items():
            made[f"{lead}.{role}.{part}"] = (dtype, ("B", pages, heads, *dims))
    if placed(site):
        made[f"{lead}.places"] = (torch.int32, ("B", pages, heads, site.kept))
    return made


def placed(site: Site) -> bool:
    """Whether positions of body tokens are stored: a window reads them."""
    return site.kept > 0 and site.tail is not None and site.window is not None


def beyond(site: Site) -> str | None:
    """What a site does that no graph here does, or None."""
    asked = {
        "parts its tokens into tiers": site.tiers,
        "stores keys before their rotation": site.frame == "pre" or site.compact,
        "chooses among all tokens of a prompt": site.at_prompt,
        "merges tokens": site.merge,
        "estimates sums from samples": site.estimate,
        "reads a part of its cache": site.retrieve,
        "reads prompts by samples": site.hyper,
    }
    score = site.select.score.by if site.select else "recency"
    if score not in ("recency", "key_norm"):
        return f"selects by {score}"
    return next((what for what, does in asked.items() if does), None)


def width(site: Site) -> int:
    """Dense tokens that a row of a site with pages holds between steps, W."""
    assert site.tail is not None
    return max(1, site.sink + site.tail + site.page - 1)


def roles(site: Site) -> tuple[tuple[str, Encoding, int], tuple[str, Encoding, int]]:
    """What a page stores: role, encoding and dims of a head."""
    return ("keys", site.key_encoding, site.key_dim), ("values", site.value_encoding, site.value_dim)


def schedule(site: Site) -> tuple[Any, ...]:
    """Sites of equal schedules let their pages leave at the same lengths."""
    return site.sink, site.tail, site.page, site.kept, site.select.budget if site.select else None


def slots(site: Site) -> int | None:
    """Pages that a budget allows, or None without one."""
    budget = site.select.budget if site.select else None
    return None if budget is None or not site.kept else budget // site.kept


def page_dim(builder: Builder, site: Site) -> int | str:
    """P: fixed under a budget, else a symbol that sites of one schedule share."""
    fixed = slots(site)
    if fixed is not None:
        return fixed
    known: dict[Any, str] = builder.shared.setdefault("page_dims", {})
    return known.setdefault(schedule(site), f"pages{len(known) or ''}")


def parts(
    builder: Builder, site: Site, role: str, encoding: Encoding, dim: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and dims of the parts of one encoded page of one head."""
    if not isinstance(encoding, Affine | Dense) or getattr(encoding, "width", None) == 3:
        raise SmeltError(
            f"{builder.name}: {role} of layer {site.layer} are stored as {encoding}, which ONNX cannot encode in the "
            "graph; the nearest that exports is affine(bits=4, group=32, zero=True)"
        )
    made = encoding.encode(torch.zeros(1, site.kept, dim))
    return {name: (part.dtype, tuple(part.shape[1:])) for name, part in made.items()}


def manifest(builder: Builder, program: Program) -> dict[str, Any]:
    """The buffers and how to drive the graph."""
    assert program.cache is not None
    table, sizes = [], {}
    for site in program.cache.sites:
        for name, (dtype, dims) in buffers(builder, site).items():
            kind = str(dtype).removeprefix("torch.")
            table.append({"past": f"past.{name}", "present": f"present.{name}", "dtype": kind, "shape": list(dims)})
        if site.tail is not None and site.kept and slots(site) is None:
            sizes[str(page_dim(builder, site))] = {"sink": site.sink, "tail": site.tail, "page": site.page}
    return {
        "run": {
            "tokens": "int64 [B, T]: new tokens, each row from the left; what is behind a row's count is not read",
            "counts": "int64 [B]: how many of them are real; give a whole prompt in one step",
            "past.lengths": "int64 [B]: tokens that each row has stored; 0 at the start",
            "loop": "every output present.X is the next step's input past.X; all start as zeros",
            "sizes": "capacity: most tokens of a row, and of any T a step brings; pages…: at least "
            "(tokens - sink - tail) // page of its entry in sizes",
            "onnxruntime": "set session.qdq_matmulnbits_accuracy_level to 1: by default products with integer weights "
            "round their activations to 8 bits, 1e-2 of the logits",
            "undo": "tokens of a step are dropped by giving the next one smaller past.lengths, as long as no page left",
        },
        "sizes": sizes,
        "cache": table,
        "plan": program.cache.to_dict(),
    }
