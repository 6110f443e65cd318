"""Batch norms that go into the convolution in front of them: after training they are a factor and a shift a channel."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.ops import arguments
from ...ir.program import Program
from ._follow import store, unfit, wide

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)


def fold_batch_norm(program: Program, norm: fx.Node) -> str | None:
    """Scale the convolution's weight and give it a bias, in the place of the norm, or say why not."""
    a = arguments(norm)
    stored = [a[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if a["training"] or any(part is not None and part.op != "get_attr" for part in stored):
        return "its statistics are computed, not stored"
    convolution = a["input"]
    if convolution.target not in CONVOLUTIONS or len(convolution.users) > 1:
        return "stands behind no convolution of its own"
    c = arguments(convolution)
    if c["weight"].op != "get_attr":
        return "its convolution's weight is computed, not stored"
    name = str(c["weight"].target)
    if why := unfit(program, {name: [convolution]}):
        return why
    gain, shift, mean, variance = (None if part is None else wide(program, str(part.target)) for part in stored)
    assert mean is not None and variance is not None
    scale = (variance + a["eps"]).rsqrt() * (1.0 if gain is None else gain)
    bias = 0.0 if c["bias"] is None else wide(program, str(c["bias"].target))
    store(program, name, wide(program, name) * scale[:, None, None, None])
    own = f"{name.removesuffix('.weight')}.shift"
    store(program, own, (bias - mean) * scale + (0.0 if shift is None else shift))
    with program.graph.inserting_before(convolution):
        added = program.weight_node(own)
    convolution.args = (*convolution.args[:2], added, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    return None
