"""Casts and copies that change nothing go, so that patterns see what is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ops import EMBEDDING, LINEAR
from ..program import Program

aten = torch.ops.aten
# what these return is their first argument, in a graph that is only evaluated and writes into nothing
_IDENTITIES = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
}
# these too, where the type is the same
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
_CONTIGUOUS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.embedding.default}
_CONTIGUOUS |= {LINEAR.target, EMBEDDING.target}


def drop_copies(program: Program) -> int:
    """Dropout, detach, copies, and casts to the type that a tensor has already → the tensor itself."""
    count = 0
    for node in program.calls(*_IDENTITIES, *_CASTS):
        if node.target in _IDENTITIES or _same_type(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # the first argument of a copy is a node
            count += 1
    return count


def loosen_views(program: Program) -> int:
    """`view` → `reshape`, unless it follows a product: strides may differ from those that the model was traced with."""
    count = 0
    for node in program.calls(aten.view.default, aten._unsafe_view.default):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.target not in _CONTIGUOUS:
            node.target = aten.reshape.default
            count += 1
    return count


def _same_type(node: fx.Node) -> bool:
    before: Any = node.args[0].meta.get("val")  # type: ignore[union-attr]  # as above
    after: Any = node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
