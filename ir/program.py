"""The Program: what is being compiled. A graph over the dialect, its weights, and its plans."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from .cache.plan import CachePlan
from .choice import ChoicePlan
from .decode import DecodePlan
from .depth import DepthPlan
from .errors import SmeltError, nearest
from .weight import Upon, Weight


@dataclass(frozen=True)
class Record:
    """One step of a Program's history: which pass ran with which options, and what came of it."""

    step: int
    name: str
    options: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"step {self.step}, {self.name}"


@dataclass
class Program:
    """A model as a graph `inputs → named outputs`.

    Nodes are placeholders (inputs), `get_attr` (a weight by name), and calls of dialect or ATen ops; the output node
    carries a dict of names. A decoder has inputs `tokens` and `positions` [B, T] and the output `logits` [B, T, V].
    `facts` are JSON values that no node carries: `vocabulary`, `context`, `eos`, `source`, ….
    """

    name: str
    graph: fx.Graph
    weights: dict[str, Weight]
    facts: dict[str, Any] = field(default_factory=dict)
    cache: CachePlan | None = None
    decode: DecodePlan | None = None
    choice: ChoicePlan | None = None
    depth: DepthPlan | None = None  # which of its blocks run for what token
    draft: Program | None = None  # a smaller decoder of the same tokens, which drafts for this one
    base: Program | None = None  # the model that this one was fine-tuned from, upon whose weights its own may stand
    history: tuple[Record, ...] = ()
    origin: dict[str, Record] = field(default_factory=dict)  # the step that last changed a weight or a plan
    touched: set[str] = field(default_factory=set)  # what the running pass changed; the manager turns it into origins

    def fork(self) -> Program:
        """A copy whose graph and tables can be edited; the tensors are shared."""
        copied: dict[fx.Node, fx.Node] = {}
        graph = fx.Graph()
        out = graph.graph_copy(self.graph, copied)
        graph.output(out)
        for old, new in copied.items():
            new.name, new.meta = old.name, copy.copy(old.meta)
        return replace(
            self,
            graph=graph,
            weights=dict(self.weights),
            facts=dict(self.facts),
            origin=dict(self.origin),
            touched=set(),
            draft=self.draft and self.draft.fork(),
        )

    def merged(self) -> Program:
        """The same, with all weights that stand upon those of the base by themselves; itself where none does."""
        if not any(isinstance(weight.parts, Upon) for weight in self.weights.values()):
            return self
        return replace(self, weights={name: weight.merged() for name, weight in self.weights.items()})

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "placeholder")

    @property
    def outputs(self) -> dict[str, fx.Node]:
        """The named results; replace entries with `set_output`."""
        return dict(self._output.args[0])  # type: ignore[arg-type]  # an output node of ours holds a dict

    @property
    def _output(self) -> fx.Node:
        last: fx.Node = next(iter(reversed(self.graph.nodes)))
        return last

    def set_output(self, name: str, node: fx.Node) -> None:
        """Add or replace a named result."""
        self._output.args = ({**self.outputs, name: node},)

    def uses(self, weight: str) -> list[fx.Node]:
        """The nodes that read a weight."""
        reads = (n for n in self.graph.nodes if n.op == "get_attr" and n.target == weight)
        return [user for node in reads for user in node.users]

    def weight_node(self, name: str, weight: Weight | None = None) -> fx.Node:
        """A node that reads weight `name`, made at the current insert point; `weight` adds or replaces its value."""
        if weight is not None:
            self.weights[name] = weight
        if name not in self.weights:
            raise SmeltError(f"program {self.name} has no weight '{name}'{nearest(name, self.weights)}")
        return self.graph.create_node("get_attr", name)

    def touch(self, *names: str) -> None:
        """Say that the running pass changes these weights, or `cache`, `decode`, `choice` or `draft`."""
        self.touched.update(names)

    def changed_by(self, name: str) -> str:
        """` since step 2, weights.quantize` for what a pass last changed, or an empty string."""
        return f" since {self.origin[name]}" if name in self.origin else ""

    def prune(self) -> None:
        """Drop dead nodes and the weights that nothing reads."""
        for node in reversed(self.graph.nodes):
            if node.op not in ("placeholder", "output") and not node.users:
                self.graph.erase_node(node)
        read = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        self.weights = {name: w for name, w in self.weights.items() if name in read}

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Nodes that call one of these targets (overloads or dialect ops), in order."""
        wanted = {getattr(t, "target", t) for t in targets}
        return (n for n in list(self.graph.nodes) if n.op == "call_function" and n.target in wanted)

    @property
    def nbytes(self) -> int:
        """Measured bytes of all weights, a draft model's own among them, those of the base not."""
        held = {id(w): w for program in (self, self.draft) if program for w in program.weights.values()}
        return sum(w.nbytes for w in held.values())
