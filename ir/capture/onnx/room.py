"""Whether an op's result fits into memory, asked before it is computed: small files can ask for endless tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .kinds import kind_of, marked

MOST = 1 << 28  # elements of one tensor


class _TooLarge(Exception):
    """A tensor of so many elements."""


class _Counting(TorchDispatchMode):
    """Refuses every result of more than MOST elements."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.numel() > MOST:
                raise _TooLarge(f"{value.numel()} elements in the shape {list(value.shape)}")
        return made


def require_room(function: Callable[..., Any], values: Sequence[Any], attributes: Mapping[str, Any]) -> None:
    """Raises ValueError if the function makes a tensor of more than MOST elements; tried on shapes without data."""
    if any(callable(value) and not isinstance(value, torch.Tensor) for value in attributes.values()):
        return  # inner graphs: their nodes are asked one by one
    try:
        with torch.device("meta"), _Counting():  # type: ignore[no-untyped-call]  # torch gives it none
            function(*tree_map(_shape_of, list(values)), **tree_map(_shape_of, dict(attributes)))
    except _TooLarge as fault:
        raise ValueError(f"it makes a tensor of {fault}, more than {MOST}") from fault
    except Exception:  # whatever needs the data itself; what is wrong with it, the op says
        return


def _shape_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape, kind = torch.empty_like(value, device="meta"), kind_of(value)
    return shape if kind is None else marked(shape, kind)
