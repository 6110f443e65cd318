"""In-place ATen calls become functional, so that every node is a value."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import SmeltError
from ..program import Program

aten = torch.ops.aten
_VIEWS = {aten.slice.Tensor, aten.view.default, aten.transpose.int, aten.select.int, aten.unsqueeze.default, aten.expand.default}


def functional(program: Program) -> int:
    """`x.op_(…)` → `x = x.op(…)`; later readers of x see the new value. Writing through a view is refused."""
    count = 0
    for node in list(program.graph.nodes):
        name = getattr(node.target, "_opname", "")
        if node.op != "call_function" or not name.endswith("_") or name.startswith("__") or name.endswith("__"):
            continue
        target = node.args[0]
        if not isinstance(target, fx.Node) or target.target in _VIEWS or target.op in ("placeholder", "get_attr"):
            raise SmeltError(f"{program.name}: {node.target} writes into {target}, which cannot be captured yet")
        packet = getattr(aten, name[:-1])
        node.target = getattr(packet, node.target._overloadname)  # type: ignore[union-attr]
        after = False
        for later in list(program.graph.nodes):
            if after:
                later.replace_input_with(target, node)
            after = after or later is node
        count += 1
    return count
