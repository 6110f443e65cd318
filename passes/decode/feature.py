"""One more layer that drafts from the model's own features (EAGLE: Rethinking Feature Uncertainty, Li et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir.blocks import Block, blocks, without
from ...ir.cache import CachePlan, Site
from ...ir.ops import LINEAR, QUANTIZED, RMS_NORM, ROTARY, arguments
from ...ir.program import Program
from ...ir.weight import Weight
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples

FEATURES = "features"  # the name of the model's output, and of the draft's input and output
PROJECTION = "feature.projection"  # begins the names of the two halves of the projection
NORM = "feature.norm"  # begins those of the norms in front: features are hundreds of times as large as embeddings
EPSILON = 1e-6


@dataclass(frozen=True)
class Feature(Pass):
    """A draft model of one layer that guesses the model's next feature, and through the model's head the next token.

    A feature [B, T, K] is the state behind the model's last layer, in front of its last norm; the model gives it out as
    `features`. At place t the draft reads the feature of t and the embedding of the token at t + 1, each behind a norm,
    projects both to K, and goes through a layer like the model's last one; what comes out stands for the feature of
    t + 1. Where no feature is known yet it takes its own. Embedding, last norm and head are the model's. It drafts when
    decode.draft comes behind it, and drafts badly until train.feature has run.

    dtype: how its own weights and its keys and values are stored.

    Deviations: the layer starts as the model's last one, with its normalisation, where the released code starts anew.
    Features are taken in front of the last norm, which the draft then shares; the released code's lie behind it. The
    norms in front of the projection are EAGLE-3's.
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

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the draft model and the output that it reads; the graph stays as it is otherwise."""
        draft = replace(program.fork(), decode=None, draft=None, choice=None, depth=None)
        draft.name = f"{program.name}, a layer over its features"
        for node in draft.calls(QUANTIZED):
            node.replace_all_uses_with(arguments(node)["x"])
        last = blocks(program)[-1]
        names = _only(program, last.layer)
        without(draft, [block for block in blocks(draft) if block.layer != last.layer])
        for name in names:
            draft.weights[name] = self._weight(draft.weights[name].dense())
        kept = blocks(draft)
        names += self._project(draft, kept[0], int(last.add.meta["shape"][-1]))
        draft.set_output(FEATURES, kept[-1].add)
        draft.prune()
        assert draft.cache is not None
        draft.cache = CachePlan(tuple(self._site(site) for site in draft.cache.sites))
        draft.facts["own"] = names
        draft.facts["trained"] = False
        program.set_output(FEATURES, last.add)
        program.draft = draft
        program.touch("draft")
        own = [draft.weights[name] for name in names]
        notes = {"parameters": sum(w.parts["data"].numel() for w in own), "bytes": sum(w.nbytes for w in own)}
        return Outcome((f"layer {last.layer}",), notes=notes)

    def _project(self, draft: Program, first: Block, width: int) -> list[str]:
        """Put the projection in front of the layer, which at first takes the features alone; names of its weights."""
        graph, stream = draft.graph, first.add.args[first.stream]
        assert isinstance(stream, fx.Node)
        draft.facts["inputs"] = {FEATURES: {"shape": ["B", "T", width], "dtype": "float32"}}
        with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
            features = graph.placeholder(FEATURES)
        users = list(stream.users)
        names, sides = [], []
        starts = {"token": (stream, torch.zeros(width, width)), "feature": (features, torch.eye(width))}
        with graph.inserting_before(next(node for node in graph.nodes if node in users)):
            for side, (source, start) in starts.items():
                names += [f"{NORM}.{side}", f"{PROJECTION}.{side}"]
                weights = [
                    draft.weight_node(name, self._weight(value))
                    for name, value in zip(names[-2:], (torch.ones(width), start), strict=True)
                ]
                normed = graph.call_function(RMS_NORM.target, (source, weights[0], EPSILON, 0.0))
                sides.append(graph.call_function(LINEAR.target, (normed, weights[1])))
            joined = graph.call_function(torch.ops.aten.add.Tensor, tuple(sides))
        for user in users:
            user.replace_input_with(stream, joined)
        return names

    def _site(self, site: Site) -> Site:
        geometry = (site.layer, site.heads, site.kv_heads, site.key_dim, site.value_dim, site.window)
        return Site(*geometry, self.dtype, rope=site.rope, scale=site.scale, softcap=site.softcap)

    def _weight(self, value: torch.Tensor) -> Weight:
        return Weight.of(value.to(getattr(torch, self.dtype)))


def _only(program: Program, layer: int) -> list[str]:
    """The weights that one layer reads and nothing else; tables of angles are no weights of a layer."""
    rest = program.fork()
    without(rest, [block for block in blocks(rest) if block.layer == layer])
    angles = {arguments(node)["inv_freq"].target for node in program.calls(ROTARY)}
    return sorted(program.weights.keys() - rest.weights.keys() - angles)
