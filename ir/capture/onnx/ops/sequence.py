"""ONNX sequences and optionals: Python lists and None while tracing, so nothing of them is left in the graph."""

from __future__ import annotations

import torch

from ....errors import SmeltError
from ..known import Known, as_tensor
from ..registry import Body, Number, Tensor, Value, op

Sequence = list[Tensor]


@op("SequenceConstruct")
def sequence_construct(*items: Tensor) -> Value:
    """A sequence of its inputs."""
    return list(items)


@op("SequenceEmpty")
def sequence_empty(*, dtype: int = 1) -> Value:
    """A sequence without items."""
    return []


@op("SequenceInsert")
def sequence_insert(sequence: Value, item: Tensor, position: Number | None = None) -> Value:
    """With `item` put before `position`, at the end if none is given."""
    at = len(sequence) if position is None else int(position)
    return [*sequence[: _place(at, sequence, 1)], item, *sequence[_place(at, sequence, 1) :]]


def _place(position: int, sequence: Sequence, more: int) -> int:
    size = len(sequence)
    if not -size <= position < size + more:
        raise SmeltError(f"position {position} lies outside a sequence of {size}")
    return position + size if position < 0 else position


@op("SequenceErase")
def sequence_erase(sequence: Value, position: Number | None = None) -> Value:
    """Without the item at `position`, the last if none is given."""
    at = _place(-1 if position is None else int(position), sequence, 0)
    return [*sequence[:at], *sequence[at + 1 :]]


@op("SequenceAt")
def sequence_at(sequence: Value, position: Number) -> Tensor:
    """The item at `position`."""
    item: Tensor = as_tensor(sequence[_place(int(position), sequence, 0)])
    return item


@op("SequenceLength")
def sequence_length(sequence: Value) -> Value:
    """How many items there are."""
    return Known.of(len(sequence))


@op("ConcatFromSequence")
def concat_from_sequence(sequence: Value, *, axis: int, new_axis: int = 0) -> Tensor:
    """All items joined along an axis, or along a new one."""
    items = [as_tensor(item) for item in sequence]
    return torch.stack(items, axis) if new_axis else torch.cat(items, axis)


@op("SplitToSequence")
def split_to_sequence(x: Tensor, split: Value = None, *, axis: int = 0, keepdims: int = 1) -> Value:
    """x cut along an axis: into ones, equal parts of a size (a scalar), or parts of the sizes given."""
    if split is None:
        parts = torch.split(x, 1, axis)
        return [part if keepdims else part.squeeze(axis) for part in parts]
    if not isinstance(split, Known):
        raise SmeltError("SplitToSequence: its sizes must be known while importing")
    numbers = split.numbers()
    return list(torch.split(x, numbers[0] if not split.shape else numbers, axis))


@op("SequenceMap")
def sequence_map(sequence: Value, *others: Value, body: Body, outputs: int) -> tuple[Value, ...]:
    """`body` of each item, other sequences taken along item by item."""
    rows = [
        body(item, *(other[i] if isinstance(other, list) else other for other in others))
        for i, item in enumerate(sequence)
    ]
    return tuple([as_tensor(row[k]) for row in rows] for k in range(outputs))


@op("Optional")
def optional(value: Value = None, *, type: Value = None) -> Value:  # ONNX's name
    """A value that may be there, or one that is not."""
    return value


@op("OptionalGetElement")
def optional_get_element(value: Value) -> Value:
    """The value of an optional that has one."""
    if value is None:
        raise SmeltError("OptionalGetElement of an optional that is empty")
    return value


@op("OptionalHasElement")
def optional_has_element(value: Value = None) -> Value:
    """Whether an optional has a value."""
    return Known.of(value is not None, torch.bool)
