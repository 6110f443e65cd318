"""Takes units out of a graph: rows and columns of weights, and every size that a node states.

New sizes are tried, not trusted: each moving node is called with its new arguments on the numbers of the channels that
stay, and must give exactly the numbers that its old result keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import arguments
from ...ir.program import Program
from ...ir.weight import Weight
from ._trace import MOVES, Labels, move
from ._units import Site

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}

Edits = Mapping[fx.Node, tuple[Any, ...]]


def resize(site: Site, units: torch.Tensor) -> Edits | str:
    """The arguments of the site's moving nodes once only `units` (ascending) are left, or why there are none."""
    kept = site.numbers_of(units)
    before = dict(site.region)
    after: dict[fx.Node, Labels] = {}
    edits: dict[fx.Node, tuple[Any, ...]] = {}
    for node, labels in site.region:
        left = [_left(part, kept) for part in _parts(labels)]
        if any(part is None for part in left):
            return f"{node.name} does not hold its units in one dimension"
        after[node] = left if isinstance(labels, list) else left[0]  # type: ignore[assignment]  # no None is left
        if node.target not in MOVES:
            continue
        if any(n not in after and "value" not in n.meta for n in node.all_input_nodes):
            return f"{node.name} mixes its channels with others"
        args = _arguments(node, before, after[node], kept)
        if not _gives(node, args, after):
            return f"{node.name} states sizes that cannot be changed to fit"
        edits[node] = args
    return edits


def shrink(program: Program, site: Site, units: torch.Tensor, edits: Edits, matrix: torch.Tensor) -> None:
    """Leave only `units` of a site; `matrix` [N, K'] is the new weight of its consumer. Weights are dense."""
    kept = site.numbers_of(units)
    for node, labels in site.producers:
        rows = torch.nonzero(kept[labels.long()]).flatten()
        for part in ("weight", "bias"):
            if (read := arguments(node)[part]) is not None:
                old = program.weights[str(read.target)]
                _replace(program, str(read.target), {"data": old.parts["data"].index_select(0, rows)})
    name = str(arguments(site.consumer)["weight"].target)
    try:
        store(program, name, matrix)
    except SmeltError as error:
        raise SmeltError(f"{name}: its correction does not fit, {error}") from error
    restate(site, edits)


def store(program: Program, name: str, value: torch.Tensor) -> None:
    """Another tensor in the encoding of the old one."""
    _replace(program, name, program.weights[name].encoding.encode(value))


def restate(site: Site, edits: Edits) -> None:
    """Give the moving nodes of a site their new arguments."""
    for node, args in edits.items():
        node.args = args
    for node, _ in site.region:
        node.meta.pop("val", None)  # a shape from before; derive() gives the new one


def _replace(program: Program, name: str, parts: Mapping[str, torch.Tensor]) -> None:
    program.weights[name] = Weight(tuple(parts["data"].shape), program.weights[name].encoding, parts)
    program.touch(name)


def _left(labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
    """The numbers that stay, or None if they are not whole slices of one dimension."""
    mask = kept[labels.long()]
    varies = [d for d in range(mask.dim()) if bool((mask.amin(d) != mask.amax(d)).any())]
    if not varies:
        return labels if bool(mask.all()) else None
    if len(varies) > 1:
        return None
    places = mask.movedim(varies[0], -1).reshape(-1, mask.shape[varies[0]])[0]
    return labels.index_select(varies[0], torch.nonzero(places).flatten())


def _arguments(node: fx.Node, before: Mapping[fx.Node, Labels], left: Labels, kept: torch.Tensor) -> tuple[Any, ...]:
    """The node's arguments with its stated sizes and bounds as they should be for the result `left`."""
    args: Any = node.args
    x, rest, parts = args[0], args[1:], _parts(left)
    shape = parts[0].shape
    if node.target in _VIEWS:
        return (x, [size if _free(size) else shape[i] for i, size in enumerate(rest[0])], *rest[1:])
    if node.target is aten.unflatten.int:
        first = rest[0] % _parts(before[x])[0].dim()
        return (x, rest[0], [size if _free(size) else shape[first + i] for i, size in enumerate(rest[1])])
    if node.target is aten.split.Tensor:
        return (x, shape[rest[1] if len(rest) > 1 else 0], *rest[1:])
    if node.target is aten.split_with_sizes.default:
        return (x, [part.shape[rest[1] if len(rest) > 1 else 0] for part in parts], *rest[1:])
    if node.target is aten.slice.Tensor:
        return (x, *_bounds(_parts(before[x])[0], rest, kept))
    return node.args


def _free(size: Any) -> bool:
    """Whether a view leaves this size open: -1, or a size of the inputs."""
    return not isinstance(size, int) or size == -1


def _bounds(labels: torch.Tensor, rest: Sequence[Any], kept: torch.Tensor) -> Sequence[Any]:
    """`dim, start, end, …` of a slice, counted in what stays."""
    dim, start, end = (*rest, *(0, None, None)[len(rest) :])[:3]
    size = labels.shape[dim]
    stays = kept[labels.movedim(dim, -1).reshape(-1, size).long()]
    if bool((stays.amin(1) == stays.amax(1)).all()):
        return rest  # it is another dimension that shrinks
    counts = stays[0].cumsum(0)

    def moved(bound: Any) -> Any:
        if not isinstance(bound, int) or bound >= size:
            return bound
        at = max(bound + size if bound < 0 else bound, 0)
        return int(counts[at - 1]) if at else 0

    return (dim, moved(start), moved(end), *rest[3:])


def _gives(node: fx.Node, args: tuple[Any, ...], after: Mapping[fx.Node, Labels]) -> bool:
    try:
        found = _parts(move(node, args, after))
    except (RuntimeError, IndexError):
        return False
    return len(found) == len(_parts(after[node])) and all(map(torch.equal, found, _parts(after[node])))


def _parts(labels: Labels) -> list[torch.Tensor]:
    return labels if isinstance(labels, list) else [labels]
