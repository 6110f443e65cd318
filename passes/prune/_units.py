"""Finds what can be taken out of a graph: neurons, and groups of attention heads with their keys and values.

A unit is a set of channels between matrix products: rows of the products above, columns of the one below. Numbers that
were carried from row to column (`_trace.py`) and joined on the way are one unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import ATTENTION, EXPERTS, arguments, is_op
from ...ir.program import Program
from ...ir.shapes import derive
from ._trace import Kind, Labels, Lost, Trace, numbers_in


@dataclass(frozen=True, eq=False)
class Site:
    """The units between `producers` (with the numbers of their rows) and the one product that reads them.

    columns: int64 [U, W], the consumer's input columns of each unit.
    region: every value in between with its numbers, in graph order; the producers' results among them.
    """

    name: str
    kind: Kind
    consumer: fx.Node
    producers: tuple[tuple[fx.Node, torch.Tensor], ...]
    columns: torch.Tensor
    region: tuple[tuple[fx.Node, Labels], ...]
    component: torch.Tensor  # of each number
    components: torch.Tensor  # [U], of each unit

    def numbers_of(self, units: torch.Tensor) -> torch.Tensor:
        """Bool over all numbers: those of some units, given by index."""
        return torch.isin(self.component, self.components[units])

    def units_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The index of the unit of each number; they must be this site's."""
        index = torch.empty_like(self.component)
        index[self.components] = torch.arange(len(self.components))
        return index[self.component[numbers.long()]]

    @property
    def consumer_weight(self) -> str:
        """The name of the weight whose columns they are."""
        return str(arguments(self.consumer)["weight"].target)

    @property
    def weights(self) -> Iterator[str]:
        """The weights that taking a unit out would change."""
        yield self.consumer_weight
        for node, _ in self.producers:
            a = arguments(node)
            yield from (str(a[part].target) for part in ("weight", "bias") if a[part] is not None)


@dataclass(frozen=True)
class Refusal:
    """Why the channels that a product reads cannot be taken out."""

    kind: Kind
    reason: str


def find_units(program: Program) -> tuple[list[Site], dict[str, Refusal]]:
    """The sites in graph order, and by name what reads numbered channels without being a site.

    Derives the Program's shapes. A product that reads a residual stream is neither: its columns are everyone's.
    """
    derive(program)
    trace = Trace(program)
    component = _components(trace.joined, trace.count)
    owners: dict[int, set[fx.Node]] = {}
    for node in trace.read:
        labels = trace.at[arguments(node)["x"]]
        if isinstance(labels, torch.Tensor):
            for c in component[numbers_in(labels)].unique().tolist():
                owners.setdefault(c, set()).add(node)
    regions: dict[fx.Node, list[tuple[fx.Node, Labels]]] = {node: [] for node in trace.read}
    for at, value in trace.at.items():
        if not isinstance(value, Lost):
            found = component[numbers_in(value)].unique().tolist()
            for reader in set().union(*(owners.get(c, set()) for c in found)):
                regions[reader].append((at, value))
    stays = {c: why for fixed, why in reversed(trace.fixed) for c in component[fixed].unique().tolist()}
    sites: list[Site] = []
    refused: dict[str, Refusal] = {}
    for node in trace.read:
        made = _site(program, trace, node, component, owners, stays, tuple(regions[node]))
        if isinstance(made, Site):
            sites.append(made)
        else:
            refused[_name(node)] = made
    for node in program.calls(EXPERTS):
        refused[str(arguments(node)["down"].target)] = Refusal("neurons", "its neurons are inside routed experts")
    return sites, refused


def _site(
    program: Program,
    trace: Trace,
    node: fx.Node,
    component: torch.Tensor,
    owners: dict[int, set[fx.Node]],
    stays: dict[int, str],
    region: tuple[tuple[fx.Node, Labels], ...],
) -> Site | Refusal:
    labels = trace.at[arguments(node)["x"]]
    if isinstance(labels, Lost):
        return Refusal(labels.kind, labels.reason)
    kind: Kind = "heads" if any(is_op(n, ATTENTION) for n, _ in region) else "neurons"
    assert isinstance(labels, torch.Tensor)  # a product takes one tensor
    places = component[labels.reshape(-1, labels.shape[-1]).long()]
    columns = places[0]
    if bool((places != columns).any()):
        return Refusal(kind, f"the columns of {node.name} are other channels at other places")
    units = list(dict.fromkeys(columns.tolist()))
    if why := next((stays[unit] for unit in units if unit in stays), None):
        return Refusal(kind, why)
    if len(readers := set().union(*(owners[unit] for unit in units))) > 1:
        names = ", ".join(sorted(_name(reader) for reader in readers))
        return Refusal(kind, f"its channels are read by {names}")
    components = torch.tensor(units)
    producers = []
    for producer in (n for n, _ in region if n in trace.rows):
        if not bool(torch.isin(component[trace.rows[producer].long()], components).all()):
            return Refusal(kind, f"{_name(producer)} has rows of other sites as well")
        producers.append((producer, trace.rows[producer]))
    if len(units) < 2:
        return Refusal(kind, f"its {len(columns)} channels leave together or not at all")
    widths = torch.bincount(columns)[components]
    if bool((widths != widths[0]).any()):
        return Refusal(kind, "its units differ in size")
    index = torch.empty_like(component)
    index[components] = torch.arange(len(units))
    members = index[columns].argsort(stable=True).reshape(len(units), -1)
    site = Site(_name(node), kind, node, tuple(producers), members, region, component, components)
    shared = next((name for name in site.weights if len(program.uses(name)) > 1), None)
    return Refusal(kind, f"its weight {shared} is read at several places") if shared else site


def _name(node: fx.Node) -> str:
    """A product by its weight."""
    return str(arguments(node)["weight"].target).removesuffix(".transposed").removesuffix(".weight")


def _components(joined: list[torch.Tensor], count: int) -> torch.Tensor:
    """For each number the smallest that it is joined to, int64 [count]."""
    least = torch.arange(count)
    if not joined:
        return least
    a, b = torch.cat(joined, 1).long()
    while True:
        low = torch.minimum(least[a], least[b])
        new = least.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        new = new[new]
        if torch.equal(new, least):
            return least
        least = new
