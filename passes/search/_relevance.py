"""How much of a model's answer goes through each matrix product: layer-wise relevance propagation over a Program.

What the model answers, one unit for each answer, is passed back from node to node and none of it is lost but in biases:
in a product by the positive parts of its terms (the z+ rule), in attention by gradient ⊙ attention (Chefer et al. 2021,
arXiv:2012.09838), in a sum by the magnitudes of what is added, through norms and activations as it is, and elsewhere
by gradient ⊙ activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.interpret import call, interpret
from ...ir.ops import ATTENTION, EMBEDDING, HEAD, LINEAR, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Samples
from ..tune._attention import looked_at
from ..weights._follow import moves

aten = torch.ops.aten
PIECE = 16  # rows of the samples at once
Values = dict[fx.Node, tuple[Any, ...]]


def relevance(program: Program, samples: Samples) -> dict[fx.Node, float]:
    """Of each product with a stored matrix the share of the answers that goes through it; of the head this is 1.

    An answer is the likeliest class at each place of the logits. Needs derived shapes.
    """
    if "logits" not in program.outputs:
        raise SmeltError(f"relevance is that of the likeliest class, but {program.name} gives no logits")
    found: dict[fx.Node, float] = {}
    pieces = range(0, len(samples), PIECE)
    for at in pieces:
        samples.progress(at, len(samples), "propagating relevance")
        for node, shares in _back(program, samples.rows(slice(at, at + PIECE)).inputs).items():
            found[node] = found.get(node, 0.0) + float(shares.sum()) / len(pieces)
    return found


def _back(program: Program, inputs: Mapping[str, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """The relevance at each product, [B, …] of sum 1 behind the last of them."""
    args, results = _run(program, inputs)
    logits = program.outputs["logits"]
    values = results[logits].detach()
    start = torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)
    held = {logits: start / start.sum()}
    found: dict[fx.Node, torch.Tensor] = {}
    for node in reversed(args):
        here = held.pop(node, None)
        if here is None:
            continue
        if is_op(node, LINEAR, HEAD):
            found[node] = here
        for source, shares in _rule(node, args[node], results[node], here).items():
            held[source] = held[source] + shares if source in held else shares
    return found


def _run(program: Program, inputs: Mapping[str, torch.Tensor]) -> tuple[Values, dict[fx.Node, Any]]:
    """Of each node, in order, the values of its arguments, and its own; attention's have gradients of the answers."""
    args: Values = {}
    results: dict[fx.Node, Any] = {}
    learned = program.fork()
    names = {str(arguments(node)["weight"].target) for node in program.calls(EMBEDDING)}
    learned.weights |= {name: Weight.of(program.weights[name].dense().requires_grad_()) for name in names}
    ours = dict(zip(learned.graph.nodes, program.graph.nodes, strict=True))

    def watch(node: fx.Node, given: tuple[Any, ...], value: Any) -> None:
        args[ours[node]], results[ours[node]] = given, value
        if is_op(node, ATTENTION):
            value.retain_grad()

    with torch.enable_grad():
        given = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in inputs.items()}
        logits = interpret(learned, given, watch=watch)["logits"]
        logits.amax(-1).sum().backward()
    return args, results


@torch.no_grad()
def _rule(node: fx.Node, given: tuple[Any, ...], result: Any, here: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    """What the computed operands of a node get of its relevance."""
    sources = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    if is_op(node, LINEAR, HEAD):
        return {sources[0]: _product(given[0], given[1], here)} if sources else {}
    if is_op(node, ATTENTION):
        return {arguments(node)["value"]: _attention(node, given, result, here)}
    if node.target is aten.add.Tensor and len(sources) == 2:
        sizes = [given[at].abs().expand(here.shape) for at in range(2)]
        total = (sizes[0] + sizes[1]).clamp_min(1e-12)
        shares = [(here * size / total).sum_to_size(given[at].shape) for at, size in enumerate(sizes)]
        return _added(zip(sources, shares, strict=True))
    if len(sources) == 1 and isinstance(result, torch.Tensor) and not moves(node):
        source = given[node.args.index(sources[0])]
        if source.shape == result.shape:
            return {sources[0]: here}
    return _general(node, given, result, here)


def _product(x: torch.Tensor, weight: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """The z+ rule: what each input adds to a result, x [..., K], weight [N, K], here [..., N] → [..., K]."""
    more, less = weight.clamp_min(0), weight.clamp_max(0)
    high, low = x.clamp_min(0), x.clamp_max(0)
    shares = here / (high @ more.T + low @ less.T).clamp_min(1e-12)
    return high * (shares @ more) + low * (shares @ less)


def _attention(node: fx.Node, given: tuple[Any, ...], result: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """What values get [B, G, S, E] of what attention gave [B, H, T, E]: shares of the positive part of A ⊙ ∇A."""
    value, slope = given[2], result.grad
    assert slope is not None  # `watch` asked for it
    named: dict[str, Any] = {**dict(zip(ATTENTION.arguments, given, strict=False)), **node.kwargs}
    weights = looked_at(**named)
    heads = torch.repeat_interleave(value, weights.shape[1] // value.shape[1], 1)
    pairs = (weights * (slope @ heads.transpose(-1, -2))).clamp_min(0)
    pairs = torch.where(pairs.sum(-1, keepdim=True) > 0, pairs, weights)
    shares = (pairs / pairs.sum(-1, keepdim=True)).transpose(-1, -2) @ here
    got: torch.Tensor = shares.unflatten(1, (value.shape[1], -1)).sum(2)
    return got


def _general(node: fx.Node, given: tuple[Any, ...], result: Any, here: torch.Tensor) -> dict[fx.Node, torch.Tensor]:
    """Moved elements keep theirs; other operands get shares of |gradient ⊙ activation|."""
    pairs: list[tuple[fx.Node, torch.Tensor]] = []

    def leaf(source: fx.Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        pairs.append((source, value.detach().requires_grad_(source.op != "get_attr")))
        return pairs[-1][1]

    flat = _leaves(node.args, given, leaf)
    learn = [(source, value) for source, value in pairs if value.requires_grad]
    if not learn:
        return {}
    with torch.enable_grad():
        made = call(node, flat, node.kwargs)
    moving = moves(node)
    back = here if moving else here / torch.where(made.abs() > 1e-9, made, 1e-9)
    slopes = torch.autograd.grad(made, [value for _, value in learn], back.detach(), allow_unused=True)
    shares = [
        torch.zeros_like(value) if slope is None else slope if moving else (slope * value.detach()).abs()
        for (_, value), slope in zip(learn, slopes, strict=True)
    ]
    total = sum(share.sum() for share in shares)
    scale = here.sum() / total if float(total) else torch.zeros(())
    return _added((source, share * scale) for (source, _), share in zip(learn, shares, strict=True))


def _leaves(nodes: Any, values: Any, leaf: Any) -> Any:
    """`values` with each one that a node gave replaced by what `leaf` makes of it."""
    if isinstance(nodes, fx.Node):
        return leaf(nodes, values)
    if isinstance(nodes, list | tuple):
        return type(values)(_leaves(a, b, leaf) for a, b in zip(nodes, values, strict=True))
    return values


def _added(shares: Any) -> dict[fx.Node, torch.Tensor]:
    found: dict[fx.Node, torch.Tensor] = {}
    for source, share in shares:
        found[source] = found[source] + share if source in found else share
    return found
