"""Convolutions as matrix products over unfolded windows, so that every pass on products reaches them.

High Performance Convolutional Neural Networks for Document Processing (Chellapilla et al., 2006, hal-00112631).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.ops import LINEAR, arguments
from ...ir.program import Program
from ...ir.shapes import derive
from ...ir.weight import Weight
from ..base import Exactness, Outcome, Pass, Samples
from ._batch import CONVOLUTIONS
from ._follow import unfit

aten = torch.ops.aten


@dataclass(frozen=True)
class Unfold(Pass):
    """Writes each convolution as a `linear` with the weight [O, C · height · width], over windows laid out as rows.

    A window of one pixel needs no layout; others take height · width / stride² times the memory of what they read.
    Convolutions in groups stay. Batch norms behind convolutions go into them by `weights.fold`, put in front.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Unfold the convolutions of one weight after the other."""
        derive(program)
        skipped: dict[str, str] = {}
        readers: dict[str, list[fx.Node]] = {}
        for node in program.calls(*CONVOLUTIONS):
            weight = arguments(node)["weight"]
            if weight.op == "get_attr":
                readers.setdefault(str(weight.target), []).append(node)
            else:
                skipped[node.name] = "its weight is computed, not stored"
        done: list[str] = []
        for name, nodes in readers.items():
            reasons = [unfit(program, {name: nodes}), *(_refusal(node) for node in nodes)]
            if why := next(filter(None, reasons), None):
                skipped |= dict.fromkeys((node.name for node in nodes), why)
                continue
            for node in nodes:
                _rewrite(program, node)
            weight = program.weights[name]
            program.weights[name] = Weight.of(weight.parts["data"].reshape(weight.shape[0], -1))
            program.touch(name)
            done.append(name)
        program.prune()
        derive(program)
        return Outcome(tuple(done), skipped)


def _refusal(node: fx.Node) -> str | None:
    """Why a convolution is no matrix product, or None."""
    a, sizes = arguments(node), node.meta["shape"]
    if a["groups"] > 1:
        return f"its {a['groups']} groups read channels of their own: no one matrix product"
    if len(sizes) < 4 or not all(isinstance(size, int) for size in sizes[2:]):
        return f"its images [{', '.join(map(str, sizes))}] have no fixed height and width"
    return None if padding(node) else "its padding is wider on one side"


def _rewrite(program: Program, node: fx.Node) -> None:
    a = arguments(node)
    x, window, around = a["input"], list(a["weight"].meta["shape"][2:]), padding(node)
    stride, dilation = pair(a["stride"]), pair(a["dilation"])
    with program.graph.inserting_before(node):
        call = program.graph.call_function
        if [*window, *stride, *(around or ())] == [1, 1, 1, 1, 0, 0]:
            columns = call(aten.flatten.using_ints, (x, 2))
        else:
            columns = call(aten.im2col.default, (x, window, dilation, around, stride))
        rows = call(aten.transpose.int, (columns, 1, 2))  # [B, height · width, K]
        product = call(LINEAR.target, (rows, a["weight"], a["bias"]))
        turned = call(aten.transpose.int, (product, 1, 2))
        made = call(aten.unflatten.int, (turned, 2, list(node.meta["shape"][2:])))
    node.replace_all_uses_with(made)


def padding(node: fx.Node) -> list[int] | None:
    """Rows and columns that a convolution adds on each side; None where one side has more."""
    a = arguments(node)
    if not isinstance(a["padding"], str):
        return pair(a["padding"])
    window, dilation = a["weight"].meta["shape"][2:], pair(a["dilation"])
    total = [d * (size - 1) * (a["padding"] == "same") for d, size in zip(dilation, window, strict=True)]
    return None if any(each % 2 for each in total) else [each // 2 for each in total]


def pair(given: Any) -> list[int]:
    """Height and width of an option, which may be given once for both."""
    values = [given] if isinstance(given, int) else list(given)
    return values * 2 if len(values) == 1 else values
