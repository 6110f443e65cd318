"""In-place ATen calls become functional and copies that change nothing go, so that every node is a value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import SmeltError
from ..program import Program

aten = torch.ops.aten
# what these return is their first argument, in a graph that is only evaluated
_IDENTITIES = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
# these too, where neither type nor shape changes
_COPIES = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.type_as.default,
}
_CONTIGUOUS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.embedding.default}


def functional(program: Program) -> int:
    """`x.op_(…)` → `y = x.op(…)`, and later readers of x read y.

    Refuses to write into an input, a weight, or storage that another node views and someone reads later.
    """
    count = 0
    for node in program.calls(*_in_place(program)):
        target = node.args[0]
        later = _after(node)
        reason = _shared(program, node, later)
        if reason:
            raise SmeltError(f"{program.name}: {node.target} writes into {reason}, which cannot be captured yet")
        node.target = _functional_of(program, node.target)
        for reader in later:
            reader.replace_input_with(target, node)  # type: ignore[arg-type]  # a tensor argument of ours is a node
        count += 1
    return count


def drop_copies(program: Program) -> int:
    """Dropout, detach, and casts and copies to the type that a tensor has already → the tensor itself."""
    count = 0
    for node in program.calls(*_IDENTITIES, *_COPIES):
        if node.target in _IDENTITIES or _same_type(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # as above
            count += 1
    return count


def loosen_views(program: Program) -> int:
    """`view` → `reshape`, unless it follows a product: strides may differ from those that the model was traced with."""
    count = 0
    for node in program.calls(aten.view.default):
        if getattr(node.args[0], "target", None) not in _CONTIGUOUS:
            node.target = aten.reshape.default
            count += 1
    return count


def _in_place(program: Program) -> set[Any]:
    found = {n.target for n in program.graph.nodes if n.op == "call_function"}
    return {t for t in found if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable}


def _functional_of(program: Program, overload: Any) -> Any:
    name = overload._opname.removesuffix("_")
    found = getattr(getattr(aten, name, None), overload._overloadname, None)
    if found is None or found is overload:
        raise SmeltError(f"{program.name}: {overload} writes into its argument, which cannot be captured yet")
    return found


def _after(node: fx.Node) -> list[fx.Node]:
    found = []
    while (node := node.next).op != "root":
        found.append(node)
    return found


def _shared(program: Program, node: fx.Node, later: list[fx.Node]) -> str | None:
    """What besides its first argument holds the storage that `node` writes to and is still read; None if nothing is."""
    target: Any = node.args[0]
    root = _root(target)
    if root.op != "call_function":
        return f"the {'weight' if root.op == 'get_attr' else 'input'} {root.target}"
    read = {used for reader in later for used in reader.all_input_nodes}
    before = [n for n in program.graph.nodes if n not in (target, node, *later)]
    others = [n for n in before if n in read and _root(n) is root]
    return f"{target}, which shares storage with {others[0]}" if others else None


def _root(node: fx.Node) -> fx.Node:
    """The node that made the storage that this node shows."""
    while node.op == "call_function":
        shown: Any = node.args[0] if node.args else None
        is_part = node.target is operator.getitem and _shows_argument(shown.target)
        if not is_part and not _shows_argument(node.target):
            break
        node = shown
    return node


def _shows_argument(target: Any) -> bool:
    if target in _IDENTITIES:
        return True
    return isinstance(target, torch._ops.OpOverload) and any(r.alias_info is not None for r in target._schema.returns)


def _same_type(node: fx.Node) -> bool:
    before: Any = node.args[0].meta.get("val")  # type: ignore[union-attr]  # the first argument of a copy is a node
    after: Any = node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
