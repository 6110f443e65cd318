"""A sum and the norm of it as one node: SkipSimplifiedLayerNormalization gives both."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from ...ir.ops import RMS_NORM, arguments, is_op
from ...ir.program import Program
from .builder import Builder, Value
from .forms import Given, Made, form, standard


@form("aten.add.Tensor", style="ort")
def add(b: Builder, node: fx.Node, a: Given) -> Made:
    """x + y of equal shapes [B, T, K] together with the RMS norm that reads it; any other sum is the standard one."""
    norm = next((user for user in node.users if is_op(user, RMS_NORM) and user.args[0] is node), None)
    x, y = a["self"], a["other"]
    if norm is None or not _summed(x) or not _summed(y) or x.shape != y.shape or a["alpha"] != 1:
        return standard(node)(b, node, a)
    given = arguments(norm)
    if given["weight"].op != "get_attr":
        return standard(node)(b, node, a)
    program: Program = b.shared["program"]
    name = str(given["weight"].target)
    weight = b.array(name, (program.weights[name].dense() + given["offset"]).numpy().astype(np.float32))
    normed, total = b.fresh(f"{norm.name}/normed"), b.fresh(f"{node.name}/sum")
    names = (b.name_of(x), b.name_of(y), weight)
    b.shared["style"].node(b, "SkipSimplifiedLayerNormalization", names, (normed, "", "", total), epsilon=given["eps"])
    b.shared["normed", norm] = normed
    return total


@form("smelt.rms_norm", style="ort")
def rms_norm(b: Builder, node: fx.Node, a: Given) -> Made:
    """What the sum before it made, or the standard form."""
    made = b.shared.get(("normed", node))
    return standard(node)(b, node, a) if made is None else str(made)


def _summed(x: object) -> bool:
    """Whether it is a float32 tensor [B, T, K] that the graph computes."""
    return isinstance(x, Value) and x.weight is None and x.dtype == torch.float32 and len(x.shape or ()) == 3
