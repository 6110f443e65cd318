"""smelt.json: what a caller of an exported graph must know, and what made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...ir.program import Program
from .builder import OPSET, Builder
from .styles import Style

FORMAT = 1


def manifest(builder: Builder, program: Program, style: Style, facts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values: the graph in numbers, inputs and outputs by the style, drafter, choice, recipe and remarks."""
    known: dict[str, Any] = {
        key: program.facts[key] for key in ("kind", "vocabulary", "context", "eos", "family") if key in program.facts
    }
    return {
        "format": FORMAT,
        "name": program.name,
        "style": style.name,
        "opset": OPSET,
        **known,
        "nodes": dict(sorted(Counter(node.op_type for node in builder.nodes).items())),
        "weight_bytes": sum(tensor.nbytes for tensor in builder.tensors.values()),
        **style.manifest(builder, program),
        "drafter": _drafter(program),
        "choice": None if program.choice is None else program.choice.to_dict(),
        "steps": [record.name for record in program.history],
        "notes": list(builder.notes),
        **{key: value for key, value in facts.items() if key != "report"},
    }


def _drafter(program: Program) -> dict[str, Any] | None:
    """The loop around the graph that speculates; the graph itself holds no drafter."""
    plan = program.decode
    if plan is None:
        return None
    how = {
        "recycle": "keep a table [vocabulary, width] of token ids, all 0; after every step set its row of each token "
        "that was read to the width best ids of the logits behind it, later tokens last; a node takes entry "
        "ranks[node] of its parent's row",
        "heads": "the output heads [B, T, J, V] at the last accepted token: a node at depth d takes the ranks[node]-th "
        "best id of head d - 1",
    }
    return {**plan.to_dict(), **({"propose": how[plan.drafter]} if plan.drafter in how else {})}
