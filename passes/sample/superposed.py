"""Several drafts for one pass (Superposed Decoding: Multiple Generations from a Single Pass, Shen et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir import choice
from ...ir.errors import SmeltError
from ...ir.ops import EMBEDDING, arguments
from ...ir.program import Program
from ..base import Calibration, Outcome, Samples
from ._search import Searching, set_search

aten = torch.ops.aten


@dataclass(frozen=True)
class Superposed(Searching):
    """Each step reads the mixture of all drafts' last tokens, and all drafts go on from the one law behind it.

    Which token goes with which draft is told by n-grams that are counted in the calibration text. Nothing is verified:
    no draft has the model's law, and with `drafts: 1` and `alpha: 0` the text is greedy decoding's.

    drafts: that are written side by side, k; the best is the answer, the others are given beside it.
    alpha: how much counted text weighs against the model; 0 counts none, and all drafts choose alike.
    temperature: of the model's law, whose logarithms are sums with those of counted text.
    candidates: the model's likeliest tokens, m, which alone go on.
    weights: of the counted shares behind the last 1, 2, … tokens.
    penalty: nats for a token that counted text does not know behind its draft.

    Deviations: the penalty falls on tokens that are not known, where released code drops them as long as their draft
    knows any. Drafts of different lengths compare by the mean of their scores. Embeddings are mixed where they are
    looked up; their shares add up to 1, so that what scales them comes to the same.
    """

    kind: ClassVar[type[choice.Search]] = choice.Superposed

    drafts: int = 3
    alpha: float = 0.54
    temperature: float = 0.06
    candidates: int = 9
    weights: tuple[float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12)
    penalty: float = 200.0

    @property
    def calibration(self) -> Calibration:
        return "text" if self.alpha else "none"

    def requires(self, program: Program) -> Iterator[str]:
        """As every search, and tokens that are looked up in tables and read nowhere else."""
        yield from super().requires(program)
        for node in program.graph.find_nodes(op="placeholder"):
            others = [user.name for user in node.users if user.target not in (EMBEDDING.target, aten.sym_size.int)]
            if node.target == "tokens" and others and self.drafts > 1:
                yield f"{program.name} must read tokens by embeddings alone, which can be mixed, but reads {others[0]}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Count the text, add inputs for all drafts but the first, and set the search."""
        search, notes = self.search(), {}
        if self.drafts > 1:
            mix(program, search.inputs)
        set_search(program, search)
        if self.alpha:
            if samples is None:
                raise SmeltError("sample.superposed counts text: pass calibration texts to compile, or set alpha to 0")
            tables = counted(samples.tokens, int(program.facts["vocabulary"]), len(self.weights) + 1)
            assert program.choice is not None
            program.choice = program.choice.with_tables(tables)
            grams = sum(table.numel() for name, table in tables.items() if name.endswith("keys"))
            notes = {"ngrams": grams, "bytes": sum(t.numel() * t.element_size() for t in tables.values())}
        return Outcome(("choice",), notes=notes)


def mix(program: Program, names: tuple[str, ...]) -> None:
    """Read x + Σ share (y - x) in the place of the embedding x of a token; y are those of the tokens `beside`.

    Inputs that a caller leaves out are zeros, so that the shares are. A share is as wide as the embedding, if there is
    one width: kernels of one shape go together.
    """
    graph = program.graph
    places = list(graph.find_nodes(op="placeholder"))
    looked = [node for node in program.calls(EMBEDDING) if arguments(node)["ids"].target == "tokens"]
    widths = {int(node.meta["shape"][-1]) for node in looked}
    width = widths.pop() if len(widths) == 1 else 1
    told = dict(program.facts.get("inputs") or {})
    with graph.inserting_after(places[-1]):
        made = {name: graph.placeholder(name) for name in reversed(names)}
    for name in names:
        ids = name.startswith("beside")
        shape, dtype = ["B", "T", *([] if ids else [width])], "int64" if ids else "float32"
        told[name] = {"shape": shape, "dtype": dtype, "optional": True}
    program.facts["inputs"] = told
    for node in looked:
        weight, users, out = arguments(node)["weight"], list(node.users), node
        with graph.inserting_before(node.next):
            for beside, share in zip(names[::2], names[1::2], strict=True):
                other = graph.call_function(EMBEDDING.target, (made[beside], weight))
                apart = graph.call_function(aten.sub.Tensor, (other, node))
                part = graph.call_function(aten.mul.Tensor, (apart, made[share]))
                out = graph.call_function(aten.add.Tensor, (out, part))
        for user in users:
            user.replace_input_with(node, out)


def counted(tokens: torch.Tensor, vocabulary: int, longest: int) -> dict[str, torch.Tensor]:
    """The n-grams of tokens [N, T], n from 1 to `longest`, as sorted `keys` and their summed-up counts, `total`.

    A key is number · vocabulary + token, with the number that the n-gram's first n - 1 tokens have among theirs.
    """
    if tokens.shape[1] < longest:
        raise SmeltError(
            f"sample.superposed: sequences of {tokens.shape[1]} tokens hold no {longest} in a row: "
            "calibrate with longer text, or set fewer weights"
        )
    out = {}
    parents = torch.zeros_like(tokens)
    for n in range(1, longest + 1):
        grams = parents * vocabulary + tokens[:, n - 1 :]
        keys, number, counts = grams.unique(return_inverse=True, return_counts=True)
        out[f"ngrams.{n}.keys"] = keys
        out[f"ngrams.{n}.total"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        parents = number[:, :-1]
    return out
