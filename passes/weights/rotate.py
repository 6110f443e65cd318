"""Rotations that spread outlier channels over all (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, GATED, HADAMARD, LAYER_NORM, LINEAR, arguments, is_op
from ...ir.ops.hadamard import walsh
from ...ir.program import Program
from ...ir.shapes import derive
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._follow import behind, matrix, products, store, unfit, wide
from ._heads import Values, values
from ._stream import stream
from ._turn import turned

Which = Literal["residual", "values", "down"]
_FACT = "rotated"  # the fact that keeps what was rotated already
_STREAM = "residual stream"
aten = torch.ops.aten
_ACTIVATIONS = {aten.gelu.default, aten.relu.default, aten.silu.default}


@dataclass(frozen=True)
class Rotate(Pass):
    """Turns channels by random orthogonal matrices that cancel out between the products around them.

    which: `residual` turns the residual stream, and so what every norm's products read; its norms must have a gain of 1
        (weights.fold). `values` turns each head's values, and so what attention's output product reads. `down` turns
        what a feed-forward part's last product reads, while the model runs: `smelt::hadamard` stands in front of it.
    seed: of the random signs.

    A width that is no power of two has a random orthogonal factor for its odd part. In front of `down` only the part
    that is a power of two is turned, in blocks.

    Deviations: values of attention are turned within heads and not across them. Keys are turned in the cache instead,
    by a `rotated` encoding. Products are computed in float64 and stored in float32.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"encodings"})

    which: tuple[Which, ...] = ("residual", "values", "down")
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses to turn nothing."""
        if not self.which:
            raise SmeltError("which is empty: name residual, values or down")

    def requires(self, program: Program) -> Iterator[str]:
        """No cache yet: what it stores would change."""
        if program.cache is not None and "values" in self.which:
            yield f"weights.rotate must come before the cache is inserted{program.changed_by('cache')}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Turn each of `which` where that cancels out."""
        derive(program)
        done: list[str] = []
        skipped: dict[str, str] = {}
        before = set(program.facts.get(_FACT, []))
        if "residual" in self.which:
            why = "is rotated already" if _STREAM in before else self._residual(program)
            self._note(_STREAM, why, done, skipped)
        for name, found in values(program).items() if "values" in self.which else ():
            if isinstance(found, str):
                skipped[name] = found
            else:
                self._note(found.name, self._values(program, found, before), done, skipped)
        for node in program.calls(LINEAR, EXPERTS) if "down" in self.which else ():
            if is_op(node, EXPERTS) or _activated(arguments(node)["x"]):
                name = str(arguments(node)["down" if is_op(node, EXPERTS) else "weight"].target)
                self._note(name, _down(program, node), done, skipped)
        if done:
            program.facts[_FACT] = sorted(before.union(done))
        return Outcome(tuple(done), skipped)

    @staticmethod
    def _note(name: str, why: str | None, done: list[str], skipped: dict[str, str]) -> None:
        if why is None:
            done.append(name)
        else:
            skipped[name] = why

    def _residual(self, program: Program) -> str | None:
        """Turn the residual stream, or why not."""
        found = stream(program)
        if isinstance(found, str):
            return found
        dims = found.written()
        readers: list[fx.Node] = list(found.products)
        for norm in found.norms:
            a = arguments(norm)
            gain = wide(program, str(a["weight"].target)) + a.get("offset", 0.0)
            if is_op(norm, LAYER_NORM) or bool((gain != gain[0]).any()):
                return f"{norm.name} is no RMSNorm with one gain for all channels: put weights.fold in front"
            behind_it = products(norm)
            if isinstance(behind_it, str):
                return f"{norm.name} is {behind_it}"
            readers.extend(behind_it)
        for node in readers:
            dim, users = dims.setdefault(matrix(node), (-1, set()))
            if dim != -1:
                return f"{matrix(node)} both reads and writes it"
            users.add(node)
        if why := unfit(program, {name: users for name, (_, users) in dims.items()}):
            return why
        for name, (dim, _) in dims.items():
            _along(program, name, dim, lambda x: turned(x, self.seed))
        return None

    def _values(self, program: Program, found: Values, before: set[str]) -> str | None:
        """Turn the values of one attention, the same way in every head."""
        if found.name in before:
            return "is rotated already"
        made = arguments(found.producer)
        for part, dim in (("weight", -2), ("bias", -1)):
            if made[part] is not None:
                _along(program, str(made[part].target), dim, lambda x: _among(x, found.rows, self._head))
        read = str(arguments(found.consumer)["weight"].target)
        _along(program, read, -1, lambda x: _among(x, found.columns, self._head))
        return None

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        return turned(x, self.seed)


def _along(program: Program, name: str, dim: int, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A weight turned along a dim."""
    store(program, name, turn(wide(program, name).movedim(dim, -1)).movedim(-1, dim))


def _among(x: torch.Tensor, heads: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The places [H, E] of the last dim turned, a head at a time, and the others as they are."""
    heads = torch.unique(heads, dim=0)
    out = x.clone()
    out[..., heads.flatten()] = turn(x[..., heads]).flatten(-2)
    return out


def _activated(x: fx.Node) -> bool:
    """Whether a value is what an activation gives, turned or not: the middle of a feed-forward part."""
    source = behind(x)
    return is_op(source, GATED, HADAMARD) or source.target in _ACTIVATIONS


def _down(program: Program, node: fx.Node) -> str | None:
    """Turn what a feed-forward part's last product reads, or why not."""
    if is_op(node, EXPERTS):
        return "routed experts hold their activations inside"
    x, weight = arguments(node)["x"], arguments(node)["weight"]
    if is_op(behind(x), HADAMARD):
        return "is rotated already"
    if weight.op != "get_attr":
        return "its weight is computed, not stored"
    name = str(weight.target)
    width = program.weights[name].shape[-1]
    size = width & -width
    if size == 1:
        return f"its {width} columns have no power of two as a factor"
    if why := unfit(program, {name: [node]}):
        return why
    earlier: Any = next((user for user in x.users if is_op(user, HADAMARD)), None)
    if earlier is None:
        with program.graph.inserting_before(node):
            earlier = program.graph.call_function(HADAMARD.target, (x, size))
    node.replace_input_with(x, earlier)
    _along(program, name, -1, lambda w: (walsh(w.unflatten(-1, (-1, size))) / math.sqrt(size)).flatten(-2))
    return None
