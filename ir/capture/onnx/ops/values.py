"""Values of a graph while it is traced: what is known, as a tensor where a tensor is needed."""

from __future__ import annotations

from ..known import Known
from ..registry import Value


def as_tensor(value: Value) -> Value:
    """A tensor of the graph for what is known; everything else as it is."""
    return value.tensor() if isinstance(value, Known) else value
