"""Drafts by prompt tokens that run behind the nodes of a tree (Parallel Prompt Decoding, Chen et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.ops import EMBEDDING, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable
from ._trees import usual_rates

PROMPTS = "prompts.tokens"  # the weight that holds their embeddings, [prompts, K]
aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default)


@dataclass(frozen=True)
class Prompts(Pass):
    """Token ids behind the vocabulary's stand for prompt tokens, whose embeddings are a weight of their own.

    The j-th prompt token behind a node of the draft tree sees the node and all that this one sees, and the prompt
    tokens between; its logits guess the token j + 1 places behind the node's next one. No node sees a prompt token, so
    that the logits of the vocabulary's tokens are untouched. The embeddings start as the mean of all tokens':
    correct, but hardly faster, until train.prompts has run.

    prompts: how many tokens ahead are guessed, m.
    width: candidates taken from each prompt token.
    rows: drafted tokens and prompt tokens of a step, the pending token not counted; which nodes stand there, and how
        many prompt tokens behind each, follows from hit rates. A machine may hold it to less, `smelt tune`.
    dtype: how the embeddings are stored.

    Deviations: one sparse tree, which a step that knows fewer guesses takes less deep, where the paper has a tree for
    each number of guesses. Embeddings start as a mean, the released ones as those of words. Acceptance is by the walk,
    which keeps the model's law when sampling; typical acceptance, the paper's, can be had by decode.relax.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    prompts: int = 3
    width: int = 10
    rows: int = 31  # 32 a step, with the pending token
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if min(self.prompts, self.width) < 1 or self.rows < 2:
            raise SmeltError(
                f"prompts and width count from 1 and rows from 2, not {self.prompts}, {self.width} and {self.rows}"
            )

    def draft(self) -> decode.Prompts:
        """The draft before anything is measured."""
        return decode.Prompts((usual_rates(self.width),) * self.prompts, self.rows)

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not draft yet, and embeds its tokens once."""
        yield from joinable(program, self.draft())
        vocabulary = program.facts.get("vocabulary", self.width)
        if vocabulary < self.width:
            yield f"width must be at most the vocabulary of {vocabulary} tokens, but is {self.width}"
        if PROMPTS in program.weights:
            since = program.changed_by(PROMPTS)
            yield f"{program.name} must not have prompt tokens yet, but has them{since}: keep one of the two steps"
        elif len(found := readers(program)) != 1 or not is_op(found[0], EMBEDDING):
            read = ", ".join(node.name for node in found) or "nothing"
            yield f"{program.name} must read its tokens in one embedding and nowhere else, but {read} reads them"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Look ids behind the vocabulary's up in the new weight, and add the decode plan."""
        (words,) = readers(program)
        a = arguments(words)
        tokens, table = a["ids"], program.weights[str(a["weight"].target)]
        vocabulary, graph = int(program.facts["vocabulary"]), program.graph
        mean = table.dense()[:vocabulary].float().mean(0)
        weight = Weight.of(mean.expand(self.prompts, -1).clone().to(getattr(torch, self.dtype)))
        with graph.inserting_before(words):
            known = graph.call_function(aten.clamp.default, (tokens, None, vocabulary - 1))
            numbers = graph.call_function(aten.clamp.default, (tokens, vocabulary, vocabulary + self.prompts - 1))
            numbers = graph.call_function(aten.sub.Tensor, (numbers, vocabulary))
            prompts = graph.call_function(EMBEDDING.target, (numbers, program.weight_node(PROMPTS, weight)))
            real = graph.call_function(aten.lt.Scalar, (tokens, vocabulary))
            real = graph.call_function(aten.unsqueeze.default, (real, -1))
        with graph.inserting_after(words):
            either = graph.create_node("call_function", aten.where.self)
        words.replace_all_uses_with(either)
        words.replace_input_with(tokens, known)
        either.args = (real, words, prompts)
        join(program, self.draft())
        program.facts["prompts_trained"] = False
        program.touch(PROMPTS)
        return Outcome((PROMPTS,), notes={"parameters": weight.parts["data"].numel(), "bytes": weight.nbytes})


def readers(program: Program) -> list[fx.Node]:
    """What reads the tokens, in whatever shape, and not only asks for that."""
    readers = [node for node in program.graph.find_nodes(op="placeholder") if node.target == "tokens"]
    while any(node.op == "placeholder" or node.target in VIEWS for node in readers):
        readers = [
            user
            for node in readers
            for user in (node.users if node.op == "placeholder" or node.target in VIEWS else (node,))
            if user.target is not aten.sym_size.int
        ]
    return readers
