"""Where gates stand in a model: factors of channels, one for each unit that can be taken out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import fx

from ...ir.blocks import Block, blocks, without
from ...ir.errors import SmeltError
from ...ir.ops import LINEAR, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from .._walk import Walk
from ..weights._follow import behind, unfit
from ._interpolate import gram_of, interpolation
from ._shrink import resize, shrink, store
from ._units import Site, find_units
from ._width import STREAM, find_width

Kind = Literal["neurons", "heads", "blocks", "width"]
RIDGE = 1e-6  # damping of a fit, relative to the mean square of what is read
KINDS: tuple[Kind, ...] = ("neurons", "heads", "blocks", "width")


class Place(Protocol):
    """Where the gates of some units stand.

    index: int64 [K], the unit of each channel; [1] where all channels are one unit.
    reads: pairs of a node and the operand [..., K] that it reads multiplied.
    """

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> torch.Tensor: ...
    @property
    def reads(self) -> Sequence[tuple[fx.Node, fx.Node]]: ...

    def extents(self, program: Program) -> Mapping[str, tuple[int | None, torch.Tensor]]:
        """The weights that its units are parts of: along which dim, and how many places of it each unit has, [U].

        None instead of a dim: the weight is there or not.
        """
        ...

    def leave(self, program: Program, kept: torch.Tensor, factors: torch.Tensor, walk: Walk | None) -> None:
        """Take out the units that are not kept, bool [U], and multiply the others by factors [U] for good.

        walk: with one, neurons and heads are not multiplied: what reads them is fitted to what it read before.
        """
        ...


@dataclass(frozen=True, eq=False)
class Inner:
    """Neurons or heads."""

    site: Site

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def index(self) -> torch.Tensor:
        index = torch.empty(self.site.columns.numel(), dtype=torch.int64)
        index[self.site.columns] = torch.arange(len(self.site.columns))[:, None]
        return index

    @property
    def reads(self) -> Sequence[tuple[fx.Node, fx.Node]]:
        return [(self.site.consumer, arguments(self.site.consumer)["x"])]

    @property
    def refusal(self) -> str | None:
        """Why there can be no gates, or None."""
        edits = resize(self.site, torch.arange(len(self.site.columns) - 1))
        return edits if isinstance(edits, str) else None

    def extents(self, program: Program) -> Mapping[str, tuple[int | None, torch.Tensor]]:
        count, width = self.site.columns.shape
        found: dict[str, tuple[int | None, torch.Tensor]] = {
            self.site.consumer_weight: (1, torch.full((count,), width))
        }
        for node, numbers in self.site.producers:
            rows = torch.bincount(self.site.units_of(numbers), minlength=count)
            found |= {str(part.target): (0, rows) for part in _stored(node)}
        return found

    def leave(self, program: Program, kept: torch.Tensor, factors: torch.Tensor, walk: Walk | None) -> None:
        if self.site.consumer not in set(program.graph.nodes):
            return  # its block has left
        units = torch.nonzero(kept).flatten()
        edits = resize(self.site, units)
        if isinstance(edits, str):
            raise SmeltError(f"{self.name}: {edits}")
        matrix, left = program.weights[self.site.consumer_weight].dense(torch.float64), kept[self.index]
        if walk is None:
            matrix = (matrix * factors[self.index])[:, left]
        else:
            columns = torch.nonzero(left).flatten()
            matrix = matrix @ interpolation(gram_of(walk, self.site.consumer), columns, RIDGE).T
        shrink(program, self.site, units, edits, matrix.float())


@dataclass(frozen=True, eq=False)
class Branch:
    """One residual block, attention or feed-forward part."""

    block: Block

    @property
    def name(self) -> str:
        return str(self.block)

    @property
    def index(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int64)

    @property
    def reads(self) -> Sequence[tuple[fx.Node, fx.Node]]:
        return [(self.block.add, self._branch)]

    def refusal(self, program: Program) -> str | None:
        """Why there can be no gate, or None."""
        node = behind(self._branch)
        if not is_op(node, LINEAR) or any(part.op != "get_attr" for part in _stored(node)):
            return f"{node.name} adds to the stream, and is no matrix product that takes a factor"
        return unfit(program, {str(part.target): [node] for part in _stored(node)})

    def extents(self, program: Program) -> Mapping[str, tuple[int | None, torch.Tensor]]:
        rest = program.fork()
        (twin,) = (block for block in blocks(rest) if block.add.name == self.block.add.name)
        without(rest, [twin])
        return {name: (None, torch.ones(1)) for name in program.weights.keys() - rest.weights.keys()}

    def leave(self, program: Program, kept: torch.Tensor, factors: torch.Tensor, walk: Walk | None) -> None:
        if not bool(kept):
            without(program, [self.block])
            return
        for part in _stored(behind(self._branch)):
            name = str(part.target)
            store(program, name, program.weights[name].dense() * factors)

    @property
    def _branch(self) -> fx.Node:
        branch = self.block.add.args[1 - self.block.stream]
        assert isinstance(branch, fx.Node)
        return branch


def find_places(program: Program, kinds: Collection[Kind]) -> tuple[list[Place], dict[str, str]]:
    """Where gates of some kinds can stand, in the order in which units can leave, and by name why others cannot."""
    sites, refused = find_units(program)  # derives shapes
    skipped = {name: refusal.reason for name, refusal in refused.items() if refusal.kind in kinds}
    asked: list[tuple[Place, str | None]] = []
    for branch in (Branch(block) for block in blocks(program) if "blocks" in kinds):
        asked.append((branch, branch.refusal(program)))
    if "width" in kinds:
        width = find_width(program)
        if isinstance(width, str):
            skipped[STREAM] = width
        else:
            asked.append((width, None))
    for inner in (Inner(site) for site in sites if site.kind in kinds):
        asked.append((inner, inner.refusal))
    found = []
    for place, why in asked:
        if why is None:
            found.append(place)
        else:
            skipped[place.name] = why
    return found, skipped


def gated(program: Program, places: Collection[Place]) -> tuple[Program, list[str]]:
    """A fork that multiplies at every place by a weight [K] of ones, and the names of these."""
    part = program.fork()
    twins = {node.name: node for node in part.graph.nodes}
    names = []
    for number, place in enumerate(places):
        names.append(f"gates.{number}")
        for reader, operand in place.reads:
            node, value = twins[reader.name], twins[operand.name]
            with part.graph.inserting_before(node):
                gates = part.weight_node(names[-1], Weight.of(torch.ones(len(place.index))))
                node.replace_input_with(value, part.graph.call_function(torch.ops.aten.mul.Tensor, (value, gates)))
    return part, names


def _stored(product: fx.Node) -> list[fx.Node]:
    """The weight and the bias of a product."""
    return [part for name in ("weight", "bias") if (part := arguments(product)[name]) is not None]
