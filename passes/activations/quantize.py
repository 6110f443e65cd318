"""Integer activations for matrix products (ZeroQuant, Yao et al. 2022, arXiv:2206.01861, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, HEAD, LINEAR, QUANTIZED, arguments, is_op
from ...ir.program import Program
from ...ir.shapes import derive
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Quantize(Pass):
    """Rounds what enters matrix products to symmetric integers, at run time, with a scale for each group of a row.

    With weights in integers the products are ones of integers then, which a CPU does four at a time; with other weights
    the rounded values are multiplied as they are.

    bits: width of a code.
    group: neighbours in a row that share a scale; 0 is the whole row, as in the paper. Rows that it does not divide
        keep their precision.
    head: whether the vocabulary head's input is rounded too.

    Deviations: the paper's scale is one a token; groups of 32, as integer runtimes have them, keep an outlier's
    neighbours. Routed experts read their input through an index and keep it as it is.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    bits: Literal[4, 8] = 8
    group: int = 32
    head: bool = True

    def __post_init__(self) -> None:
        """Refuses a group that no row has."""
        if self.group < 0:
            raise SmeltError(f"group is a count of activations (0: the whole row), but is {self.group}")

    def requires(self, program: Program) -> Iterator[str]:
        """Inputs that are not rounded yet."""
        rounded = next(iter(program.calls(QUANTIZED)), None)
        if rounded is not None:
            yield f"{rounded.name} must not be rounded yet, but is{program.changed_by('activations')}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """One rounding for each tensor, however many products read it."""
        derive(program)
        skipped: dict[str, str] = {node.name: "routed experts keep their input" for node in program.calls(EXPERTS)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if is_op(node, LINEAR, HEAD):
                x = arguments(node)["x"]
                if why := self._refusal(node, x):
                    skipped[node.name] = why
                else:
                    readers.setdefault(x, []).append(node)
        for x, products in readers.items():
            first = next(node for node in program.graph.nodes if node in products)
            with program.graph.inserting_before(first):
                width = self.group or int(x.meta["shape"][-1])
                rounded = program.graph.call_function(QUANTIZED.target, (x, self.bits, width))
            for product in products:
                product.replace_input_with(x, rounded)
        if readers:
            program.touch("activations")
        done = tuple(product.name for products in readers.values() for product in products)
        notes: dict[str, Any] = {"bits_per_activation": self.bits + 32 / self.group} if self.group else {}
        return Outcome(done, skipped, notes)

    def _refusal(self, node: fx.Node, x: fx.Node) -> str | None:
        width = x.meta["shape"][-1]
        if is_op(node, HEAD) and not self.head:
            return "the vocabulary head, and head is false"
        if self.group and int(width) % self.group:
            return f"its rows of {width} are no multiple of {self.group}"
        return None
