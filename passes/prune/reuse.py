"""Leaves parts of a text encoder out, and lets neighbours stand in (Skrr, Seo et al., 2025, arXiv 2502.08690)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from ...ir.blocks import Block, blocks, without
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._walk import Walk
from ..base import Calibration, Effect, Outcome, Pass, Samples


@dataclass(frozen=True)
class Reuse(Pass):
    """Takes the attention and feed-forward parts out of an encoder that its embeddings miss least, by beam search.

    Each round leaves one part more out of every set that was kept, and keeps the best sets by the discrepancy: the mean
    squared error of the embeddings over their mean square. Then each part that was left out, in order, is computed
    again with the weights of the next part of its kind that stayed, before or behind it, where the discrepancy falls:
    that costs operations, and no memory.

    share: how much of the parts to leave out, rounded to whole ones.
    output: the program's output that holds the embeddings, behind the projection that the image model reads.
    beam: sets of parts that go on to the next round.
    null: the token ids of the null prompt of classifier-free guidance, which counts as much as all the samples. Empty:
        there is none.
    reuse: whether parts that stayed stand in for others.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    share: float = 0.4
    output: str = "prompt"
    beam: int = 3
    null: tuple[int, ...] = ()
    reuse: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise SmeltError(f"share is above 0 and below 1, but is {self.share}")
        if self.beam < 1:
            raise SmeltError(f"beam is a count of sets, but is {self.beam}")

    @property
    def calibration(self) -> Calibration:
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """The output, parts on the way to it, and no cache."""
        if self.output not in program.outputs:
            yield f"{program.name} must have the output '{self.output}', but has {', '.join(program.outputs)}"
        elif not _parts(program, self.output):
            yield f"residual blocks with attention must lead to '{self.output}', but none were found"
        if program.cache is not None:
            yield f"prune.reuse must come before the cache is inserted{program.changed_by('cache')}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Search the parts to leave out, then those that others stand in for."""
        if samples is None:
            raise SmeltError("prune.reuse compares embeddings of sample prompts: pass calibration inputs to compile")
        encoder = program.fork()
        encoder.graph.output_node().args = ({self.output: encoder.outputs[self.output]},)
        encoder.prune()
        before, parts = program.nbytes, _parts(encoder, self.output)
        names = [str(part) for part in parts]
        discrepancy = Discrepancy(encoder, self.output, samples, self.null)
        count = round(self.share * len(names))
        if not 0 < count < len(names):
            raise SmeltError(f"a share of {self.share:g} leaves {count} of {len(names)} parts out: change it")
        beam, scores = [frozenset[int]()], dict[frozenset[int], float]()
        for number in range(count):
            samples.progress(number, count, "leaving out parts")
            wider = {chosen | {i} for chosen in beam for i in range(len(names)) if i not in chosen}
            scores |= {chosen: discrepancy(_skipped(encoder, parts, chosen, {})) for chosen in wider}
            beam = sorted(wider, key=lambda chosen: (scores[chosen], sorted(chosen)))[: self.beam]
        chosen, lost = beam[0], scores[beam[0]]
        again: dict[int, int] = {}
        for slot in sorted(chosen) if self.reuse else ():
            for donor in _donors(parts, chosen, slot):
                trial = {**again, slot: donor}
                if (found := discrepancy(_skipped(encoder, parts, chosen, trial))) < lost:
                    again, lost = trial, found
        done = _skipped(program, parts, chosen, again)
        program.graph, program.weights = done.graph, done.weights
        program.touch(*program.weights)
        notes = {
            "again": {names[slot]: names[donor] for slot, donor in again.items()},
            "discrepancy": {"skipped": round(scores[chosen], 6), "after": round(lost, 6)},
            "bytes": {"before": before, "after": program.nbytes},
        }
        stays = {name: "its absence shows more" for i, name in enumerate(names) if i not in chosen}
        return Outcome(tuple(names[i] for i in sorted(chosen)), stays, notes)


class Discrepancy:
    """How far the embeddings of a program are from those of `program`, relative to their mean square."""

    def __init__(self, program: Program, output: str, samples: Samples, null: tuple[int, ...] = ()) -> None:
        self.output, self.null, self.samples = output, bool(null), samples
        if null:
            tokens = samples.inputs["tokens"]
            if tokens.shape[1] != len(null):
                raise SmeltError(f"null has {len(null)} tokens, but the sample prompts have {tokens.shape[1]}")
            given = {name: torch.cat([value, value[:1]]) for name, value in samples.inputs.items()}
            given["tokens"] = torch.cat([tokens, torch.tensor([null])])
            self.samples = replace(samples, given=given)
        self.wanted = self._embeddings(program)

    def __call__(self, program: Program) -> float:
        error = (self._embeddings(program) - self.wanted).square().flatten(1).mean(1)
        power = self.wanted.square().flatten(1).mean(1)
        if not self.null:
            return float(error.mean() / power.mean())
        return float((error[:-1].mean() + error[-1]) / (power[:-1].mean() + power[-1]))

    def _embeddings(self, program: Program) -> torch.Tensor:
        return torch.cat([value for (value,) in Walk(program, self.samples).values(program.outputs[self.output])])


def _parts(program: Program, output: str) -> list[Block]:
    """The residual blocks that an output is computed through, in order."""
    above, ahead = set[fx.Node](), [program.outputs[output]]
    while ahead:
        node = ahead.pop()
        if node not in above:
            above.add(node)
            ahead.extend(node.all_input_nodes)
    return [block for block in blocks(program) if block.add in above]


def _donors(parts: list[Block], chosen: frozenset[int], slot: int) -> list[int]:
    """The next parts of a slot's kind that stay, before and behind it."""
    alike = [i for i, part in enumerate(parts) if part.kind == parts[slot].kind and i not in chosen]
    return [*[i for i in alike if i < slot][-1:], *[i for i in alike if i > slot][:1]]


def _skipped(program: Program, parts: list[Block], chosen: frozenset[int], again: dict[int, int]) -> Program:
    """A fork without the chosen parts, but for those that another computes again; nodes are found by name."""
    fork = program.fork()
    nodes = {node.name: node for node in fork.graph.nodes}
    own = [replace(part, add=nodes[part.add.name]) for part in parts]
    for slot, donor in again.items():
        _stand_in(fork, own[slot], own[donor])
    without(fork, [own[i] for i in chosen if i not in again])
    return fork


def _stand_in(program: Program, slot: Block, donor: Block) -> None:
    """Let a part add what another computes, with the same weights, from the stream in front of it."""
    before: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node is slot.add:
            break
        before.add(node)
    depends: dict[fx.Node, bool] = {donor.input: True}
    copies = {donor.input: slot.input}

    def dependent(node: fx.Node) -> bool:
        if node not in depends:
            depends[node] = False
            depends[node] = any([dependent(each) for each in node.all_input_nodes])
        return depends[node]

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node in before and not dependent(node):
                return node
            for each in node.all_input_nodes:
                copies[each] = copied(each)
            with program.graph.inserting_before(slot.add):
                copies[node] = program.graph.node_copy(node, lambda each: copies[each])
        return copies[node]

    branch = donor.add.args[1 - donor.stream]
    assert isinstance(branch, fx.Node)
    args = list(slot.add.args)
    args[1 - slot.stream] = copied(branch)
    slot.add.args = tuple(args)
