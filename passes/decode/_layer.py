"""A draft model of one layer behind the model's own features; what the layer reads beside them is for a pass to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir.blocks import blocks, without
from ...ir.cache import CachePlan, Site
from ...ir.ops import LINEAR, QUANTIZED, RMS_NORM, ROTARY, arguments
from ...ir.program import Program
from ...ir.weight import Weight
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass

FEATURES = "features"  # the name of the model's output, and of the draft's input
PROJECTION = "feature.projection"  # begins the names of the parts of the projection, one for each side
NORM = "feature.norm"  # begins those of the norms in front: features are hundreds of times as large as embeddings
EPSILON = 1e-6


@dataclass(frozen=True)
class Layered(Pass):
    """A pass that adds such a draft model; the layer and its cache start as the model's last ones.

    dtype: how its own weights and its keys and values are stored.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"outputs", "decode"})

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan and no draft model, whose layers are residual."""
        yield from cached_decoder(program)
        if program.draft is not None:
            yield f"{program.name} must not have a draft model yet: keep one of the two steps"
        if FEATURES in program.outputs or FEATURES in program.inputs:
            yield f"{program.name} must not use the name '{FEATURES}', which stands for what the draft reads"
        layers = {block.layer for block in blocks(program)}
        if len(layers) < 2:
            yield f"{program.name} must have two residual layers or more, but has {len(layers)}"

    def layer(self, program: Program) -> Program:
        """The model without its layers but the last; `own` of its facts are the names of the weights of that one."""
        draft = replace(program.fork(), decode=None, draft=None, choice=None, depth=None)
        draft.name = f"{program.name}, a layer over its features"
        for node in draft.calls(QUANTIZED):
            node.replace_all_uses_with(arguments(node)["x"])
        last = blocks(program)[-1].layer
        without(draft, [block for block in blocks(draft) if block.layer != last])
        draft.facts |= {"own": _only(program, last), "trained": False}
        for name in draft.facts["own"]:
            draft.weights[name] = self.weight(draft.weights[name].dense())
        assert draft.cache is not None
        draft.cache = CachePlan(tuple(self._site(site) for site in draft.cache.sites))
        return draft

    def input(self, draft: Program, name: str, width: int, dtype: str) -> fx.Node:
        """A new input [B, T, width] of the draft."""
        draft.facts["inputs"] = {**draft.facts.get("inputs", {}), name: {"shape": ["B", "T", width], "dtype": dtype}}
        with draft.graph.inserting_after(list(draft.graph.find_nodes(op="placeholder"))[-1]):
            return draft.graph.placeholder(name)

    def project(self, draft: Program, sides: Mapping[str, tuple[fx.Node, torch.Tensor]]) -> None:
        """Let the layer read the sum of these sides, each behind a norm and a matrix [K, N] that starts as given."""
        first = blocks(draft)[0]
        stream, graph = first.input, draft.graph
        users = list(stream.users)
        parts = []
        with graph.inserting_before(next(node for node in graph.nodes if node in users)):
            for side, (source, start) in sides.items():
                scale = self.add(draft, f"{NORM}.{side}", torch.ones(start.shape[1]))
                normed = graph.call_function(RMS_NORM.target, (source, scale, EPSILON, 0.0))
                matrix = self.add(draft, f"{PROJECTION}.{side}", start)
                parts.append(graph.call_function(LINEAR.target, (normed, matrix)))
            joined = graph.call_function(torch.ops.aten.add.Tensor, tuple(parts))
        for user in users:
            user.replace_input_with(stream, joined)

    def attach(self, program: Program, draft: Program) -> Outcome:
        """Give the program its draft model, and the output that this reads; its graph stays as it is otherwise."""
        draft.prune()
        last = blocks(program)[-1]
        program.set_output(FEATURES, last.add)
        program.draft = draft
        program.touch("draft")
        own = [draft.weights[name] for name in draft.facts["own"]]
        notes = {"parameters": sum(w.parts["data"].numel() for w in own), "bytes": sum(w.nbytes for w in own)}
        return Outcome((f"layer {last.layer}",), notes=notes)

    def add(self, draft: Program, name: str, value: torch.Tensor) -> fx.Node:
        """A node that reads a new weight of the draft's own, at the insert point."""
        draft.facts["own"].append(name)
        return draft.weight_node(name, self.weight(value))

    def weight(self, value: torch.Tensor) -> Weight:
        """A weight as the draft stores it."""
        return Weight.of(value.to(getattr(torch, self.dtype)))

    def _site(self, site: Site) -> Site:
        geometry = (site.layer, site.heads, site.kv_heads, site.key_dim, site.value_dim, site.window)
        return Site(*geometry, self.dtype, rope=site.rope, scale=site.scale, softcap=site.softcap)


def _only(program: Program, layer: int) -> list[str]:
    """The weights that one layer reads and nothing else; tables of angles are no weights of a layer."""
    rest = program.fork()
    without(rest, [block for block in blocks(rest) if block.layer == layer])
    angles = {arguments(node)["inv_freq"].target for node in program.calls(ROTARY)}
    return sorted(program.weights.keys() - rest.weights.keys() - angles)
