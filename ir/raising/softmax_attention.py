"""Attention written out as softmax(q kᵀ · scale + mask) v, and keys and values that are repeated for their groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops import ATTENTION, arguments
from ..program import Program
from .attention import of_rank_four
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default}
_MATMUL = {aten.matmul.default, aten.bmm.default}
_SHAPINGS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
_LOWEST = -1e4  # what is added to hide a key: this or less
_SOFTCAP = Call(
    (aten.mul.Tensor,),
    (Call((aten.tanh.default,), (Call((aten.div.Tensor,), (Hole("logits"), Hole("cap"))),)), Hole("cap")),
    swaps=True,
)


@dataclass
class _Logits:
    """What stands between the product q kᵀ and the softmax."""

    product: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    mask: fx.Node | None = None
    hides: bool = False  # the mask is boolean and true where a key is hidden


def raise_softmax_attention(program: Program) -> int:
    """matmul(softmax(…), v) over [B, H, T, D] → attention."""
    count = 0
    for node in program.calls(aten.softmax.int, aten._softmax.default):
        reader, logits = _weighted(node), _logits(program, node.args[0])
        if reader is None or logits is None or node.args[1] not in (-1, node.meta["val"].dim() - 1):
            continue
        query, query_scale = _unscaled(program, logits.product.args[0])
        turned, key_scale = _unscaled(program, logits.product.args[1])
        value: Any = reader.args[1]
        if any(operand.meta["val"].dim() != 4 for operand in (query, turned, value)):
            continue
        with program.graph.inserting_before(reader):
            key, mask = _turned_back(program, turned), logits.mask
            if mask is not None and logits.hides:
                mask = program.graph.call_function(aten.logical_not.default, (mask,))
                mask.meta["val"] = logits.mask.meta["val"]  # type: ignore[union-attr]  # not None, see above
        if mask is not None:
            mask = of_rank_four(program, reader, mask)
        scale = logits.scale * query_scale * key_scale
        rewrite(program, reader, ATTENTION, query, key, value, mask, None, scale, False, None, logits.softcap)
        count += 1
    return count


def share_heads(program: Program) -> int:
    """Attention over keys and values that repeat each head for its group → over the heads themselves."""
    count = 0
    for node in program.calls(ATTENTION):
        a = arguments(node)
        key, value = _unrepeated(a["key"]), _unrepeated(a["value"])
        if (
            key is None
            or value is None
            or not statically_known_true(key.meta["val"].shape[1] == value.meta["val"].shape[1])
        ):
            continue
        a["key"], a["value"] = key, value
        node.args, node.kwargs = tuple(a[name] for name in ATTENTION.arguments), {}
        count += 1
    return count


def _weighted(node: fx.Node) -> fx.Node | None:
    """The product that reads the probabilities, through casts and a guard against rows without any key."""
    users = list(node.users)
    if len(users) == 2 and {u.target for u in users} <= {aten.isnan.default, aten.where.ScalarSelf, aten.where.self}:
        guarded = next((u for u in users if u.target is not aten.isnan.default), None)
        asks = next((u for u in users if u.target is aten.isnan.default), None)
        if guarded is None or asks is None or guarded.args[0] is not asks or guarded.args[2] is not node:
            return None
        return _weighted(guarded)
    if len(users) != 1:
        return None
    if users[0].target in _CASTS:
        return _weighted(users[0])
    return users[0] if users[0].target in _MATMUL and users[0].args[0] is node else None


def _logits(program: Program, node: Any) -> _Logits | None:
    """Walks from the softmax back to the product; None for anything that attention does not say."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in _MATMUL:
        return _Logits(node)
    if node.target in _CASTS:
        return _logits(program, node.args[0])
    capped = match(_SOFTCAP, node)
    if capped is not None and (cap := number(program, capped["cap"])) is not None:
        inner = _logits(program, capped["logits"])
        if inner is None or inner.mask is not None or inner.softcap is not None:
            return None
        inner.softcap = cap
        return inner
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _scaled(program, node)
    if node.target is aten.add.Tensor and not node.kwargs:
        for inside, mask in (node.args, node.args[::-1]):
            inner = _logits(program, inside) if _holds_product(inside) else None
            if inner is not None and inner.mask is None and isinstance(mask, fx.Node):
                inner.mask = mask
                return inner
        return None
    if node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return _chosen(program, node)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _hidden(program, node.args[0], node.args[1], node.args[2], True)
    return None


def _scaled(program: Program, node: fx.Node) -> _Logits | None:
    left, right = node.args
    factor = number(program, right)
    if factor is None and node.target is aten.mul.Tensor:
        left, factor = right, number(program, left)
    inner = None if factor is None else _logits(program, left)
    if inner is None or factor is None or inner.mask is not None or inner.softcap is not None:
        return None
    inner.scale *= factor if node.target is aten.mul.Tensor else 1 / factor
    return inner


def _chosen(program: Program, node: fx.Node) -> _Logits | None:
    condition, seen, other = node.args
    if _holds_product(seen):
        return _hidden(program, seen, condition, other, False)
    return _hidden(program, other, condition, seen, True)


def _hidden(program: Program, inside: Any, condition: Any, instead: Any, hides: bool) -> _Logits | None:
    lowest = number(program, instead)
    inner = _logits(program, inside) if lowest is not None and lowest <= _LOWEST else None
    if inner is None or inner.mask is not None:
        return None
    inner.mask, inner.hides = condition, hides
    return inner


def _holds_product(node: Any) -> bool:
    """A product lies behind scalings, casts and choices: tells logits from a mask."""
    while isinstance(node, fx.Node):
        if node.target in _MATMUL:
            return True
        if node.target in _CASTS or node.target in (aten.tanh.default, aten.masked_fill.Scalar):
            node = node.args[0]
        elif node.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
            return any(_holds_product(argument) for argument in node.args)
        elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            return any(_holds_product(argument) for argument in node.args[1:])
        else:
            return False
    return False


def number(program: Program, value: Any) -> float | None:
    """A constant of the graph as a number."""
    while isinstance(value, fx.Node) and (value.target in _CASTS or value.target in _SHAPINGS):
        value = value.args[0]
    if isinstance(value, fx.Node) and value.op == "get_attr" and value.meta["val"].numel() == 1:
        return float(program.weights[str(value.target)].dense())
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _unscaled(program: Program, node: Any) -> tuple[Any, float]:
    """A factor of the product without a scalar that it is multiplied with, and that scalar."""
    if isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.div.Tensor):
        left, right = node.args
        if (factor := number(program, right)) is not None:
            return left, factor if node.target is aten.mul.Tensor else 1 / factor
        if node.target is aten.mul.Tensor and (factor := number(program, left)) is not None:
            return right, factor
    return node, 1.0


def _turned_back(program: Program, turned: Any) -> fx.Node:
    """The key [B, H, S, D] of a right factor [B, H, D, S]."""
    if turned.target is aten.transpose.int and sorted(d % 4 for d in turned.args[1:]) == [2, 3]:
        return turned.args[0]  # type: ignore[no-any-return]  # an fx node
    if turned.target is aten.permute.default and list(turned.args[1]) == [0, 2, 3, 1]:
        key = program.graph.call_function(aten.transpose.int, (turned.args[0], 1, 2))
        key.meta["val"] = turned.args[0].meta["val"].transpose(1, 2)
        return key
    source = _through_batches(turned)
    if source is not None:
        return source
    key = program.graph.call_function(aten.transpose.int, (turned, 2, 3))
    key.meta["val"] = turned.meta["val"].transpose(2, 3)
    return key


def _through_batches(turned: fx.Node) -> fx.Node | None:
    """k of reshape(reshape(k, [B H, S, D])ᵀ, [B, H, D, S])."""
    if turned.target not in _SHAPINGS:
        return None
    middle: Any = turned.args[0]
    if middle.target not in (aten.transpose.int, aten.permute.default) or middle.meta["val"].dim() != 3:
        return None
    if middle.target is aten.permute.default and list(middle.args[1]) != [0, 2, 1]:
        return None
    if middle.target is aten.transpose.int and sorted(d % 3 for d in middle.args[1:]) != [1, 2]:
        return None
    flat = middle.args[0]
    if flat.target not in _SHAPINGS:
        return None
    source: fx.Node = flat.args[0]
    b, h, s, d = source.meta["val"].shape if source.meta["val"].dim() == 4 else (0, 0, 0, 0)
    same = all(statically_known_true(x == y) for x, y in zip(turned.meta["val"].shape, (b, h, d, s), strict=True))
    return source if same and statically_known_true(flat.meta["val"].shape[2] == d) else None


def _unrepeated(node: Any) -> fx.Node | None:
    """x of reshape(expand(x[:, :, None], …)) [B, G·R, S, D], or None."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.repeat_interleave.self_int and node.args[2:3] == (1,):
        return node.args[0] if isinstance(node.args[1], int) else None  # type: ignore[return-value]  # an fx node
    if node.target not in _SHAPINGS or not isinstance(node.args[0], fx.Node):
        return None
    spread: fx.Node = node.args[0]
    while spread.target is aten.clone.default:
        spread = spread.args[0]  # type: ignore[assignment]  # an fx node
    if spread.target is not aten.expand.default:
        return None
    narrow: Any = spread.args[0]
    source: Any = narrow.args[0] if isinstance(narrow, fx.Node) and narrow.target is aten.unsqueeze.default else None
    if source is None or narrow.args[1] not in (2, -3) or source.meta["val"].dim() != 4:
        return None
    b, g, r, s, d = spread.meta["val"].shape
    fits = all(statically_known_true(x == y) for x, y in zip(node.meta["val"].shape, (b, g * r, s, d), strict=True))
    return source if fits else None
