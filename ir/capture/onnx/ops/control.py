"""ONNX control flow, unrolled while tracing: conditions and trip counts must be known, else both ways are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....errors import SmeltError
from ..known import Known, as_tensor
from ..registry import Body, Tensor, Value, op

_MOST = 1000  # rounds of a loop


@op("If")
def if_(condition: Value, *, then_branch: Body, else_branch: Body, outputs: int) -> tuple[Value, ...]:
    """The branch that a known condition names; of an unknown one both, each element chosen when the graph runs."""
    if isinstance(condition, Known):
        return then_branch() if condition.numbers()[0] else else_branch()
    flag = condition.reshape(())
    return tuple(_chosen(flag, a, b) for a, b in zip(then_branch(), else_branch(), strict=True))


def _chosen(flag: Tensor, a: Value, b: Value) -> Value:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [_chosen(flag, x, y) for x, y in zip(a, b, strict=True)]
    a, b = as_tensor(a), as_tensor(b)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise SmeltError("If on a value known only when the graph runs: its branches give different kinds of results")
    if a.dtype != b.dtype or a.dim() != b.dim() or any(x != y for x, y in zip(a.shape, b.shape, strict=True)):
        raise SmeltError("If on a value known only when the graph runs: its branches give different shapes or types")
    return torch.where(flag, a, b)


def truth(value: Value, what: str) -> bool:
    """A condition as Python's bool; one known only at run time is refused."""
    if isinstance(value, Known):
        return bool(value.numbers()[0])
    raise SmeltError(f"{what} is known only when the graph runs, and a graph has a fixed number of steps")


@op("Loop")
def loop(count: Value, condition: Value, *carried: Value, body: Body, outputs: int) -> tuple[Value, ...]:
    """`body(i, condition, *carried)` again and again, unrolled; what it returns beyond is stacked over the rounds."""
    if count is None and condition is None:
        raise SmeltError("Loop has neither a trip count nor a condition: it would not end")
    most = _MOST if count is None else _trips(count)
    going = condition is None or truth(condition, "the condition of Loop")
    state, stacked = list(carried), [list[Value]() for _ in range(outputs - len(carried))]
    done = 0
    while going and done < most:
        after, *results = body(Known.of(done), Known.of(True, torch.bool), *state)
        state = results[: len(state)]
        for rows, row in zip(stacked, results[len(state) :], strict=True):
            rows.append(as_tensor(row))
        done += 1
        going = truth(after, "the condition of Loop")
    if going and count is None:
        raise SmeltError(f"Loop does not end within {_MOST} rounds, the most that are unrolled")
    if not done and stacked:
        raise SmeltError("Loop runs no rounds, so the shapes of what it collects are not known")
    return (*state, *(torch.stack(rows) for rows in stacked))


def _trips(count: Value) -> int:
    number = count.numbers()[0] if isinstance(count, Known) else None
    if not isinstance(number, int):
        raise SmeltError(
            "the trip count of Loop is known only when the graph runs; a graph has a fixed number of steps"
        )
    if number > _MOST:
        raise SmeltError(f"Loop over {number} rounds: it is unrolled, at most {_MOST}")
    return number


@op("Scan", since=9)
def scan(
    *values: Value,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    outputs: int,
) -> tuple[Value, ...]:
    """`body(*state, *slices)` over slices of the last inputs, unrolled; results beyond the state are stacked."""
    split = len(values) - num_scan_inputs
    state, sources = list(values[:split]), [as_tensor(v) for v in values[split:]]
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    lengths = {source.shape[axis] for source, axis in zip(sources, axes, strict=True)}
    if len(lengths) != 1 or not isinstance(length := lengths.pop(), int):
        raise SmeltError("Scan is unrolled, so the length it runs over must be known; give its inputs a fixed length")
    rows = [list[Tensor]() for _ in range(outputs - split)]
    for i in range(length):
        slices = [
            source.select(axis, length - 1 - i if back else i)
            for source, axis, back in zip(sources, axes, backwards, strict=True)
        ]
        results = body(*state, *slices)
        state = list(results[:split])
        for row, result in zip(rows, results[split:], strict=True):
            row.append(as_tensor(result))
    turned = scan_output_directions or [0] * len(rows)
    places = scan_output_axes or [0] * len(rows)
    stacked = (torch.stack(r[::-1] if back else r, at) for r, back, at in zip(rows, turned, places, strict=True))
    return (*state, *stacked)


@op("Scan")
def scan_8(
    lengths: Value,
    *values: Value,
    body: Body,
    num_scan_inputs: int,
    directions: Sequence[int] | None = None,
    outputs: int,
) -> tuple[Value, ...]:
    """The first Scan: over axis 1, for each sample of a batch on its own."""
    if lengths is not None:
        raise SmeltError("Scan of version 8 with lengths of its own a sample cannot be imported; use opset 9 or newer")
    tensors = [as_tensor(v) for v in values]
    samples = [
        scan(
            *(t[i] for t in tensors),
            body=body,
            num_scan_inputs=num_scan_inputs,
            scan_input_directions=directions,
            outputs=outputs,
        )
        for i in range(tensors[0].shape[0])
    ]
    return tuple(torch.stack([as_tensor(v) for v in parts]) for parts in zip(*samples, strict=True))
