"""A pass is a frozen dataclass with a contract and one rewrite. This one scales the logits of a decoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

import smelt
from smelt.ir.program import Program
from smelt.passes import Exactness, Outcome, Pass, Samples
from smelt.passes.manager import run
from smelt.recipes import load


@dataclass(frozen=True)
class Temper(Pass):
    """Multiplies the logits by `factor`: a fixed temperature of 1 / factor, baked into the graph."""

    factor: float = 0.5
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset] = frozenset({"numerics"})

    def requires(self, program: Program) -> Iterator[str]:
        if "logits" not in program.outputs:
            yield f"{program.name} must have the output logits, but has {sorted(program.outputs)}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        logits = program.outputs["logits"]
        with program.graph.inserting_after(logits):
            scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (logits, self.factor))
        program.set_output("logits", scaled)
        return Outcome(done=("logits",), notes={"factor": self.factor})


# a file passes/<family>/<verb>.py would be found by itself; here the class is handed to the loader
step = {"logits.temper": {"factor": 0.25}}
recipe = {"name": "temper", "family": "deploy", "does": "Scales logits.", "steps": [step]}
steps = load(recipe, {"logits.temper": Temper}).steps
source = smelt.compile(smelt.reference_model(), "none").program
result = run(source, steps)
print(result.report)
print(list(result.program.graph.nodes)[-2].format_node())
