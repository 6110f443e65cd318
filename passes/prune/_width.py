"""The width of the residual stream: which channels of it leave, with the rows and columns of all that touch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, HEAD, LINEAR, RMS_NORM, arguments, is_op
from ...ir.program import Program
from .._walk import Walk
from ..weights._follow import matrix, products, unfit
from ..weights._stream import Stream, stream
from ._shrink import resize, restate, store
from ._trace import SIZE, Labels, shape_of
from ._units import Site

STREAM = "residual stream"


@dataclass(frozen=True, eq=False)
class Width:
    """The channels of a stream that nothing but RMSNorms and products reads.

    dims: along which dim each weight has them. written: the weights that write them. region: where they are.
    """

    stream: Stream
    dims: Mapping[str, int]
    written: frozenset[str]
    region: Site
    name: str = STREAM

    @property
    def index(self) -> torch.Tensor:
        return torch.arange(self.stream.width)

    @property
    def reads(self) -> Sequence[tuple[fx.Node, fx.Node]]:
        return [(node, arguments(node)["x"]) for node in (*self.stream.norms, *self.stream.products)]

    def extents(self, program: Program) -> Mapping[str, tuple[int | None, torch.Tensor]]:
        ones = torch.ones(self.stream.width)
        return {name: (dim, ones) for name, dim in self.dims.items()}

    def leave(self, program: Program, kept: torch.Tensor, factors: torch.Tensor, walk: Walk | None) -> None:
        """As said there; gains and eps of norms make up for the mean that is taken over fewer channels."""
        units, there = torch.nonzero(kept).flatten(), set(program.graph.nodes)  # without blocks that have left
        region = replace(self.region, region=tuple(pair for pair in self.region.region if pair[0] in there))
        edits = resize(region, units)
        if isinstance(edits, str):
            raise SmeltError(f"{self.name}: {edits}")
        ratio = self.stream.width / len(units)
        for norm in (norm for norm in self.stream.norms if norm in there):
            a = arguments(norm)
            name, offset = str(a["weight"].target), a.get("offset", 0.0)
            gain = (program.weights[name].dense() + offset) * ratio**0.5
            if any(matrix(reader) in self.written for reader in _behind(norm)):  # a head that is the lookup's table
                gain = gain / torch.where(kept, factors, 1.0)
            store(program, name, gain - offset)
            norm.args, norm.kwargs = (a["x"], a["weight"], a["eps"] * ratio, offset), {}
        for name, dim in self.dims.items():
            if name not in program.weights:
                continue
            value = program.weights[name].dense()
            if name in self.written:
                value = value * factors.view(-1, *[1] * (value.dim() - 1 - dim))
            store(program, name, value.index_select(dim, units))
        restate(region, edits)
        if "hidden" in program.facts:
            program.facts["hidden"] = len(units)


def find_width(program: Program) -> Width | str:
    """That of the one stream, or why its channels cannot leave. Needs derived shapes."""
    found = stream(program)
    if isinstance(found, str):
        return found
    users: dict[str, set[fx.Node]] = {}
    dims: dict[str, set[int]] = {}
    written = found.written()
    for name, (dim, nodes) in written.items():
        dims[name], users[name] = {dim % len(program.weights[name].shape)}, set(nodes)
    for norm in found.norms:
        if not is_op(norm, RMS_NORM):
            return f"{norm.name} takes the mean of all its channels away: put weights.fold in front"
        if arguments(norm)["weight"].op != "get_attr":
            return f"the gain of {norm.name} is computed, not stored"
        if isinstance(readers := products(norm), str):
            return f"{norm.name} is {readers}"
    for node in (*found.norms, *found.products, *(reader for norm in found.norms for reader in _behind(norm))):
        name = matrix(node)
        dims.setdefault(name, set()).add(len(program.weights[name].shape) - 1)
        users.setdefault(name, set()).add(node)
    if both := next((name for name, along in dims.items() if len(along) > 1), None):
        return f"{both} both reads and writes it"
    for reader in found.products:
        if matrix(reader) in written:
            return f"{reader.name} reads it without a norm, by a matrix that writes it"
    for norm in found.norms:
        if len({matrix(reader) in written for reader in _behind(norm)}) > 1:
            return f"{norm.name} is read by the table of a lookup and by others"
    if why := unfit(program, users):
        return why
    of_each = {name: dim for name, (dim,) in dims.items()}
    return Width(found, of_each, frozenset(written), _region(program, found))


def _behind(norm: fx.Node) -> list[fx.Node]:
    found = products(norm)
    assert not isinstance(found, str)
    return found


def _region(program: Program, found: Stream) -> Site:
    """All values that have the stream's channels, as a site of which each channel is a unit."""
    channels = torch.arange(found.width)
    region: dict[fx.Node, Labels] = {}
    for node in program.graph.nodes:
        ends = is_op(node, LINEAR, HEAD, EXPERTS) or node.target is SIZE or node.op == "output"
        if node in found.writers or (not ends and any(n in region for n in node.all_input_nodes)):
            region[node] = channels.expand(shape_of(node))
    return Site(STREAM, "neurons", found.norms[0], (), channels[:, None], tuple(region.items()), channels, channels)
