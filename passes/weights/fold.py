"""Gains and shifts of norms go into the products behind them (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.ops import EXPERTS, LAYER_NORM, RMS_NORM, arguments, is_op
from ...ir.program import Program
from ...ir.shapes import derive
from ...ir.weight import Weight
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._batch import fold_batch_norm
from ._follow import matrix, products, store, unfit, wide
from ._stream import stream


@dataclass(frozen=True)
class Fold(Pass):
    """Multiplies the columns of the products behind a norm by its gain, which becomes 1, and adds its shift to biases.

    A batch norm goes into the convolution in front of it, whole.

    Where every reader of the residual stream is then a LayerNorm without a shift, what is written to the stream is
    centred (columns of tables and biases, rows of products less their mean), and the LayerNorms become RMSNorms.
    Products are computed in float64 and stored in float32.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"encodings"})

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Fold each norm that only products read, then centre the stream."""
        derive(program)
        done: list[str] = []
        skipped: dict[str, str] = {}
        for node in program.calls(torch.ops.aten.batch_norm.default):
            if why := fold_batch_norm(program, node):
                skipped[node.name] = why
            else:
                done.append(node.name)
        for node in program.calls(RMS_NORM, LAYER_NORM):
            why = _fold(program, node)
            if why is None:
                done.append(str(arguments(node)["weight"].target))
            else:
                skipped[node.name] = why
        program.prune()
        centred: tuple[str, ...] = ()
        if any(True for _ in program.calls(LAYER_NORM)):
            found = _centre(program)
            if isinstance(found, str):
                skipped["residual stream"] = f"is not centred: {found}"
            else:
                centred = found
        return Outcome((*done, *centred), skipped, {"centred": len(centred)} if centred else {})


def _fold(program: Program, norm: fx.Node) -> str | None:
    """Fold one norm, or why not."""
    a = arguments(norm)
    gain, shift, offset = a["weight"], a.get("bias"), a.get("offset", 0.0)
    if any(part is not None and part.op != "get_attr" for part in (gain, shift)):
        return "its gain is computed, not stored"
    scale = wide(program, str(gain.target)) + offset
    added = None if shift is None else wide(program, str(shift.target))
    if bool((scale == 1).all()) and added is None:
        return "has a gain of 1 already"
    readers = products(norm)
    if isinstance(readers, str):
        return readers
    if added is not None and any(is_op(reader, EXPERTS) for reader in readers):
        return "has a shift, and routed experts have no bias that would take it"
    changed = dict.fromkeys([matrix(reader) for reader in readers], readers) | {str(gain.target): [norm]}
    if added is not None:
        biases = [arguments(reader)["bias"] for reader in readers]
        changed |= {str(bias.target): [reader] for reader, bias in zip(readers, biases, strict=True) if bias}
    if why := unfit(program, changed):
        return why
    if added is not None:
        for reader in readers:
            _add(program, reader, added)
        norm.args, norm.kwargs = (a["x"], gain, None, a["eps"]), {}
    for name in dict.fromkeys(matrix(reader) for reader in readers):
        store(program, name, wide(program, name) * scale)
    store(program, str(gain.target), torch.full_like(scale, 1 - offset))
    return None


def _add(program: Program, product: fx.Node, shift: torch.Tensor) -> None:
    """Add what a product makes of a shift to its bias."""
    a = arguments(product)
    name = str(a["weight"].target)
    value = wide(program, name) @ shift
    if a["bias"] is not None:
        store(program, str(a["bias"].target), wide(program, str(a["bias"].target)) + value)
        return
    base = name.removesuffix(".transposed").removesuffix(".weight")
    own = f"{base}.bias" if f"{base}.bias" not in program.weights else f"{name}.shift"
    with program.graph.inserting_before(product):
        bias = program.weight_node(own, Weight.of(value.float()))
    product.args, product.kwargs = (a["x"], a["weight"], bias), {}
    program.touch(own)


def _centre(program: Program) -> tuple[str, ...] | str:
    """Turn the stream's LayerNorms into RMSNorms; the weights that were centred, or why there are none."""
    found = stream(program)
    if isinstance(found, str):
        return found
    if found.products:
        return f"{found.products[0].name} reads it without a norm"
    for norm in found.norms:
        if is_op(norm, RMS_NORM) or arguments(norm)["bias"] is not None:
            return f"{norm.name} reads it, and is no LayerNorm without a shift"
    written = found.written()
    if why := unfit(program, {name: readers for name, (_, readers) in written.items()}):
        return why
    for name, (dim, _) in written.items():
        value = wide(program, name)
        store(program, name, value - value.mean(dim, keepdim=True))
    for norm in found.norms:
        a = arguments(norm)
        norm.target, norm.args, norm.kwargs = RMS_NORM.target, (a["x"], a["weight"], a["eps"], 0.0), {}
    return tuple(written)
