"""The channels of attention heads in the matrices around them: rows that make values, columns that read the mix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import ATTENTION, CACHED_ATTENTION, LINEAR, arguments, is_op
from ...ir.program import Program
from ..prune._trace import shape_of
from ._follow import behind, follow, rows_at, unfit


@dataclass(frozen=True)
class Values:
    """The values of one attention.

    rows: int64 [G, E], the rows of `producer` that make the channels of each of G kv heads.
    columns: int64 [H, E], the columns of `consumer` that read those of each of H query heads; head h reads the values
        of kv head h // (H / G).
    """

    producer: fx.Node
    rows: torch.Tensor
    consumer: fx.Node
    columns: torch.Tensor

    @property
    def name(self) -> str:
        """The weight that makes the values."""
        return str(arguments(self.producer)["weight"].target)


def values(program: Program) -> dict[str, Values | str]:
    """By attention node the channels of its values, or why they cannot be changed. Needs derived shapes."""
    return {node.name: _values(program, node) for node in program.calls(ATTENTION, CACHED_ATTENTION)}


def _values(program: Program, node: fx.Node) -> Values | str:
    value = arguments(node)["value"]
    producer = behind(value)
    if not is_op(producer, LINEAR) or arguments(producer)["weight"].op != "get_attr":
        return f"its values come from {producer.name}, and not from a matrix product alone"
    _, heads, _, width = shape_of(node)
    rows = rows_at(producer, node, value)
    if rows is None:
        return f"other nodes read the rows of {producer.name} that are its values"
    mixed = follow(node, torch.arange(heads * width).view(1, heads, 1, width).expand(shape_of(node)))
    consumer, columns = mixed[0].node, mixed[0].columns
    if len(mixed) > 1 or not mixed[0].multiplies or not is_op(consumer, LINEAR) or columns is None:
        return f"{', '.join(read.node.name for read in mixed)} reads what it mixes, and not one matrix product alone"
    if not torch.equal(columns.sort().values, torch.arange(heads * width)):
        return f"the columns of {consumer.name} are not the channels of its heads"
    parts = [(producer, "weight"), (producer, "bias"), (consumer, "weight")]
    stored = [(arguments(at)[part], at) for at, part in parts]
    changed = {str(part.target): [at] for part, at in stored if part is not None}
    return unfit(program, changed) or Values(producer, rows[0, :, 0], consumer, columns.argsort().view(heads, width))
