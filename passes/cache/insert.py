"""Derives the decode step: every causal attention reads and writes a cache site, and so sees what came before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir.cache import CachePlan, Rope, Site
from ...ir.ops import ATTENTION, CACHED_ATTENTION, ROTARY, arguments, is_op
from ...ir.program import Program
from ...ir.shapes import derive
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only


@dataclass(frozen=True)
class Insert(Pass):
    """smelt::attention becomes smelt::cached_attention over a plan of dense sites, numbered in graph order.

    dtype: how keys and values are stored. float32 is exact; 16 bits round each to 11 (float16) or 8 (bfloat16)
        significant bits.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    dtype: Literal["float32", "float16", "bfloat16"] = "float16"

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]  # the promise depends on the option
        """Exact in float32; otherwise bounded by the rounding of the stored type."""
        return Exactness.EXACT if self.dtype == "float32" else Exactness.BOUNDED

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder without a cache plan whose attention sites are all causal, or none."""
        yield from decoder_only(program)
        if program.cache is not None:
            yield f"{program.name} must have no cache plan, but has one{program.changed_by('cache')}"
        refused = [node for node in program.calls(ATTENTION) if _refusal(node)]
        if refused and len(refused) < len(list(program.calls(ATTENTION))):
            yield (
                f"every attention of {program.name} must fit a cache site, but {refused[0].name} {_refusal(refused[0])}"
                f"{f', and {len(refused) - 1} more' if len(refused) > 1 else ''}: a step needs all of them or none"
            )

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Rewrite every site; the plan's geometry comes from the nodes' shapes."""
        derive(program)
        sites: list[Site] = []
        skipped: dict[str, str] = {}
        for node in program.calls(ATTENTION):
            if why := _refusal(node):
                skipped[node.name] = why
            else:
                sites.append(self._rewrite(program, node, len(sites)))
        if sites:
            program.cache = CachePlan(tuple(sites))
            program.touch("cache")
        info = torch.finfo(getattr(torch, self.dtype))
        notes = {} if self.dtype == "float32" else {"bound": f"keys and values within {info.eps / 2:.1e} of their size"}
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped, notes)

    def _rewrite(self, program: Program, node: fx.Node, layer: int) -> Site:
        a = arguments(node)
        heads, key_dim = _heads_and_dim(a["query"])
        kv_heads, value_dim = _heads_and_dim(a["value"])
        site = Site(
            layer, heads, kv_heads, key_dim, value_dim, a["window"], self.dtype,
            rope=_rope(program, a["key"]), scale=a["scale"], softcap=a["softcap"],
        )  # fmt: skip
        taken = (a["query"], a["key"], a["value"], a["sinks"], layer, a["scale"], a["window"], a["softcap"])
        with program.graph.inserting_before(node):
            new = program.graph.create_node(
                "call_function", CACHED_ATTENTION.target, taken, name=f"cached_attention_{layer}"
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
        return site


def _refusal(node: fx.Node) -> str | None:
    """Why an attention cannot become a cache site, or None."""
    a = arguments(node)
    if not a["causal"]:
        return "is not causal: its tokens see what comes after them"
    if a["mask"] is not None:
        return f"takes the mask '{a['mask'].name}', and a cache site sees every token before its own"
    return None


def _rope(program: Program, key: fx.Node) -> Rope | None:
    """How a key was turned by its position, or None where it was not, or is changed behind its rotation."""
    if not is_op(key, ROTARY):
        return None
    a = arguments(key)
    if a["positions"].op != "placeholder" or a["inv_freq"].op != "get_attr":
        return None
    inverse = program.weights[str(a["inv_freq"].target)].dense()
    return Rope(tuple(inverse.float().tolist()))


def _heads_and_dim(node: fx.Node) -> tuple[int, int]:
    """H and D of a node of shape [B, H, T, D]."""
    _, heads, _, dim = node.meta["shape"]
    return int(heads), int(dim)
