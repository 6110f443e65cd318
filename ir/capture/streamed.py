"""Runs a model whose weights lie in files: a module has its tensors while it runs, and no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..weight import Weight
from .names import tied_names


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of a module: where it stands, what stood there, and its weight if there is one."""

    table: dict[str, Any]
    key: str
    before: torch.Tensor
    weight: Weight | None

    def fill(self) -> None:
        zeros = torch.zeros(self.before.shape, dtype=torch.float32)
        value = zeros if self.weight is None else self.weight.dense()
        self.table[self.key] = nn.Parameter(value, False) if isinstance(self.before, nn.Parameter) else value

    def clear(self) -> None:
        self.table[self.key] = self.before


@contextmanager
def streamed(model: nn.Module, weights: Mapping[str, Weight]) -> Iterator[None]:
    """The model in float32 with each module's tensors present only while that module runs.

    `weights` go by the first name of tied tensors. A parameter that is on the meta device and has no weight is zero:
    checkpoints may lack what an output does not need.
    """
    first = tied_names(model)
    hooks = []
    for prefix, module in model.named_modules():
        slots = list(_slots(module, f"{prefix}." if prefix else "", first, weights))
        if slots:
            hooks.append(module.register_forward_pre_hook(_each(slots, _Slot.fill)))
            hooks.append(module.register_forward_hook(_each(slots, _Slot.clear), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _slots(module: nn.Module, prefix: str, first: Mapping[str, str], weights: Mapping[str, Weight]) -> Iterator[_Slot]:
    for table in (module._parameters, module._buffers):
        for key, tensor in table.items():
            if tensor is None:
                continue
            weight = weights.get(first[prefix + key])
            if weight is not None or tensor.is_meta:
                yield _Slot(table, key, tensor, weight)


def _each(slots: list[_Slot], act: Callable[[_Slot], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        for slot in slots:
            act(slot)

    return hook
