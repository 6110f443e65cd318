"""Numbers the output rows of every matrix product and carries the numbers through the graph.

They travel on small integer tensors of the real shapes: what only moves elements moves them, what combines elements
joins them place by place, what looks across a dimension joins all along it, and anything else fixes what it reads. Rows
whose numbers are joined must leave a model together. Nothing here knows a model or how its layers are laid out.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from ...ir.ops import ATTENTION, GATED, HEAD, LAYER_NORM, LINEAR, RMS_NORM, ROTARY, arguments, is_op
from ...ir.program import Program
from ...ir.shapes import symbol

Kind = Literal["neurons", "heads"]
Labels = torch.Tensor | list[torch.Tensor]  # a list where a node has several results

_EXAMPLES = {"B": 2, "T": 3}  # sizes the numbers are carried with
_MORE_EXAMPLES = (5, 7, 11, 13)

aten = torch.ops.aten
SIZE = aten.sym_size.int
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
MOVES = {  # results are elements of the operands, chosen by place alone
    operator.getitem,
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.cat.default, aten.stack.default, aten.repeat_interleave.self_int,
}  # fmt: skip


@dataclass(frozen=True)
class Lost:
    """A value whose numbers ended above it: why, and what they numbered."""

    reason: str
    kind: Kind


class Trace:
    """One walk over a graph whose shapes are derived.

    at: each value's numbers, or how they were lost; what depends on no product is absent.
    rows: each product's numbers [N], in the order of its output rows.
    read: products whose input is in `at`, in graph order.
    joined, fixed: pairs of numbers [2, E] that leave together; numbers that must stay, and why.
    count: numbers given so far.
    """

    def __init__(self, program: Program) -> None:
        self.at: dict[fx.Node, Labels | Lost] = {}
        self.rows: dict[fx.Node, torch.Tensor] = {}
        self.read: list[fx.Node] = []
        self.joined: list[torch.Tensor] = []
        self.fixed: list[tuple[torch.Tensor, str]] = []
        self.count = 0
        for node in program.graph.nodes:
            if node.op == "output":
                self._fix(node.all_input_nodes, f"they are an output of {program.name}")
            elif is_op(node, LINEAR, HEAD):
                self._product(program, node)
            elif any(n in self.at for n in node.all_input_nodes) and (found := self._carry(node)) is not None:
                self.at[node] = found

    def _product(self, program: Program, node: fx.Node) -> None:
        a = arguments(node)
        if any(part is not None and part.op != "get_attr" for part in (a["weight"], a["bias"])):
            self._fix(node.all_input_nodes, f"{node.name} multiplies computed values")
            return
        if a["x"] in self.at:
            self.read.append(node)
        if is_op(node, LINEAR):
            rows = program.weights[str(a["weight"].target)].shape[0]
            self.rows[node] = torch.arange(self.count, self.count + rows, dtype=torch.int32)
            self.at[node] = self.rows[node].expand(shape_of(node))
            self.count += rows

    def _carry(self, node: fx.Node) -> Labels | Lost | None:
        inputs = node.all_input_nodes
        if node.target is SIZE:
            if isinstance(node.meta["value"], int):  # what is computed from it would be wrong afterwards
                self._fix(inputs, f"{node.name} counts them")
            return None
        if node.target in CASTS or is_op(node, GATED) or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._elementwise(node)
        if lost := next((v for n in inputs if isinstance(v := self.at.get(n), Lost)), None):
            kind: Kind = "heads" if is_op(node, ATTENTION) else lost.kind
            return self._give_up(inputs, lost.reason, kind)
        if is_op(node, ATTENTION):
            return self._attention(node)
        if is_op(node, RMS_NORM, LAYER_NORM, ROTARY) and (labels := self._numbers(node.args[0])) is not None:
            self._join_along(labels, (-1,))
            if labels.dim() > 3 or _varies(labels.amin(-1)):
                return labels  # across one head, which leaves as a whole
            return self._give_up(inputs, f"{node.name} looks across all of them")
        if node.target in MOVES and all(n in self.at or "value" in n.meta for n in inputs):
            return move(node, node.args, self.at)
        return self._give_up(inputs, f"{node.name} reads them, and {node.target} is not known to keep them apart")

    def _elementwise(self, node: fx.Node) -> Labels | Lost | None:
        """Operands with numbers are joined place by place; one without joins them along what it spans.

        The result has no numbers where an operand without any is as large: a residual stream stays a residual stream.
        """
        inputs, shape = node.all_input_nodes, shape_of(node)
        spans = [shape_of(n) for n in inputs if n not in self.at and "value" not in n.meta]
        whole = shape in spans
        stays = f"{node.name} combines them with values that must stay"
        numbers = [self._numbers(n) for n in inputs if n in self.at]
        if any(n is None for n in numbers):
            lost = next((v for n in inputs if isinstance(v := self.at.get(n), Lost)), None)
            given_up = self._give_up(
                inputs, stays if whole or lost is None else lost.reason, lost.kind if lost else None
            )
            return None if whole else given_up
        first, *others = (torch.broadcast_to(n, shape) for n in numbers if n is not None)
        for other in others:
            self._join(first, other)
        along = tuple({d for span in spans for d in range(-len(span), 0) if span[d] > 1})
        if not along:
            return first
        self._join_along(first, along)
        if _varies(first.amin(along)) or (first.dim() > 3 and not whole):
            return first
        given_up = self._give_up(inputs, stays)
        return None if whole else given_up

    def _attention(self, node: fx.Node) -> Labels | Lost:
        """The query heads of a group leave with its keys and values; the result has its query heads' numbers."""
        a = arguments(node)
        q, k, v = (self._numbers(a[name]) for name in ("query", "key", "value"))
        mask = a["mask"]
        if q is None or k is None or v is None or mask in self.at:
            return self._give_up(node.all_input_nodes, f"{node.name} reads values that must stay", "heads")
        if a["sinks"] is not None:
            return self._give_up(node.all_input_nodes, f"{node.name} has a sink for each head", "heads")
        if mask is not None and not _same_for_all_heads(shape_of(mask)):
            return self._give_up(node.all_input_nodes, f"{node.name} has a mask for each head", "heads")
        for part in (q, k, v):
            self._join_along(part, (-2, -1))
        for part in (k, v):
            self._join(q[..., 0, 0], part[..., 0, 0].repeat_interleave(q.shape[1] // part.shape[1], 1))
        return q[..., :1].expand(shape_of(node))

    def _numbers(self, node: Any) -> torch.Tensor | None:
        found = self.at.get(node)
        return found if isinstance(found, torch.Tensor) else None

    def _join(self, a: torch.Tensor, b: torch.Tensor) -> None:
        pairs = torch.unique(a.reshape(-1).long() << 32 | b.reshape(-1).long())  # far faster than rows of two
        self.joined.append(torch.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def _join_along(self, labels: torch.Tensor, dims: tuple[int, ...]) -> None:
        self._join(labels, labels.amin(dims, keepdim=True).expand(labels.shape))

    def _fix(self, nodes: list[fx.Node], reason: str) -> None:
        for node in nodes:
            found = self.at.get(node)
            if not isinstance(found, Lost | None):
                self.fixed.append((numbers_in(found), reason))

    def _give_up(self, nodes: list[fx.Node], reason: str, kind: Kind | None = None) -> Lost:
        self._fix(nodes, reason)
        per_head = any((labels := self._numbers(n)) is not None and labels.dim() > 3 for n in nodes)
        return Lost(reason, kind or ("heads" if per_head else "neurons"))


def move(node: fx.Node, args: tuple[Any, ...], labels: Mapping[fx.Node, Any]) -> Labels:
    """A moving node's own call with these arguments, on numbers instead of values; operands without any are sizes."""
    args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: labels[n] if n in labels else _size(n.meta["value"]))
    moved = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function: the target is callable
    return list(moved) if isinstance(moved, tuple | list) else moved


def numbers_in(labels: Labels) -> torch.Tensor:
    """The distinct numbers of a value."""
    parts = [labels] if isinstance(labels, torch.Tensor) else labels
    return torch.unique(torch.cat([part.reshape(-1) for part in parts]))  # type: ignore[no-any-return]  # untyped in torch


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """A node's derived shape at the sizes that numbers are carried with."""
    return tuple(_size(d) for d in node.meta["shape"])


def _size(size: Any) -> int:
    if isinstance(size, int):
        return size
    others = sorted(str(s) for s in size.free_symbols if str(s) not in _EXAMPLES)
    examples = _EXAMPLES | dict(zip(others, _MORE_EXAMPLES, strict=False))
    return int(sympy.sympify(size).subs({symbol(name): value for name, value in examples.items()}))


def _same_for_all_heads(shape: tuple[int, ...]) -> bool:
    """Whether a mask [B, S], or one that broadcasts to [B, H, T, S], says the same to every head."""
    return len(shape) <= 2 or shape[-3] == 1


def _varies(labels: torch.Tensor) -> bool:
    return bool((labels != labels.reshape(-1)[0]).any())
