"""What drafts the tokens that the model then verifies: one frozen record of options a kind of drafter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import SmeltError
from .tree import Tree

Proposal: TypeAlias = Literal["fixed", "iid", "distinct"]
"""How the children of a node came about: fixed by the context, independent draws of a law, or draws without repetition.

Under noise that is keyed by position a draw that uses the verifier's own noise is fixed, too.
"""


@dataclass(frozen=True)
class Draft:
    """Options of a drafter."""

    @property
    def proposal(self) -> Proposal:
        """How the children of a node come about."""
        return "fixed"

    @property
    def most(self) -> int:
        """Rows of a step beside the pending token's, at most."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Draft, ...]:
        """The drafts that this one is made of: itself, if of no others."""
        return (self,)

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens of a draft can be left out without loss, and save what they cost."""
        return all(part.joins and not isinstance(part, Model) for part in self.parts)

    @property
    def joins(self) -> bool:
        """Whether it can be one of several: fixed by the context, and without rows of its own beside the tree."""
        return self.proposal == "fixed" and not isinstance(self, Union | Lookahead | Jacobi | Prompts)


@dataclass(frozen=True)
class Recycle(Draft):
    """The last seen `width` best successors of every token, read along a static tree (Token Recycling, 2024)."""

    tree: Tree
    width: int

    def __post_init__(self) -> None:
        _check_ranks(self.tree, self.width)

    @property
    def most(self) -> int:
        return len(self.tree) - 1


@dataclass(frozen=True)
class Heads(Draft):
    """Head j of the output `heads` proposes `width` candidates for the token j + 1 places ahead (Medusa, 2024)."""

    tree: Tree
    width: int

    def __post_init__(self) -> None:
        _check_ranks(self.tree, self.width)

    @property
    def most(self) -> int:
        return len(self.tree) - 1


@dataclass(frozen=True)
class Fused(Draft):
    """Heads of the program's `draft`, a layer over its features and its tokens, propose as Heads do (Chimera, 2024).

    The draft's logits [B, T, J, V] are those of J heads, for one place further each.
    """

    tree: Tree
    width: int

    def __post_init__(self) -> None:
        _check_ranks(self.tree, self.width)

    @property
    def most(self) -> int:
        return len(self.tree) - 1


@dataclass(frozen=True)
class Prompts(Draft):
    """Trained prompt tokens behind nodes of the tree guess the tokens after the next one (PPD, Chen et al., 2024).

    Their ids are those behind the vocabulary's. The j-th behind a node guesses the token j + 1 places behind the next.

    rates: `[j][r]`, how often its r-th best guess is right; from them the tree is made, `sparse`.
    rows: drafted tokens and prompt tokens of a step, at most.
    """

    rates: tuple[tuple[float, ...], ...]
    rows: int

    def __post_init__(self) -> None:
        _positive(self, "rows")
        if not self.rates or not all(self.rates):
            raise SmeltError("a draft by prompt tokens needs one of them, and one guess of each, or more")

    @property
    def most(self) -> int:
        return self.rows

    @property
    def cuts(self) -> bool:
        return True


@dataclass(frozen=True)
class Lookup(Draft):
    """Copies what followed the last tokens earlier in the context (prompt lookup, Saxena 2023; vLLM's n-grams).

    longest, shortest: tokens that must agree; longer agreements go first.
    tokens: how many are copied.
    branches: different continuations that are tried at once; of equally long agreements the newest go first.
    """

    longest: int = 3
    shortest: int = 1
    tokens: int = 10
    branches: int = 1

    def __post_init__(self) -> None:
        _positive(self, "shortest", "tokens", "branches")
        if self.longest < self.shortest:
            raise SmeltError(f"longest is {self.longest}, less than shortest, {self.shortest}")

    @property
    def most(self) -> int:
        return self.tokens * self.branches


@dataclass(frozen=True)
class Suffix(Draft):
    """Continues the longest suffix that occurred before as often as it did (SuffixDecoding, Oliaro et al., 2024).

    Occurrences are counted in this request's tokens alone.
    depth: tokens of the longest sequence that is counted, agreement and continuation together.
    factor: drafted tokens for each token that agrees, at most.
    least: continuations less probable than this are not drafted.
    nodes: drafted in a step at most.
    """

    depth: int = 24
    factor: float = 1.0
    least: float = 0.1
    nodes: int = 16

    def __post_init__(self) -> None:
        _positive(self, "depth", "nodes")
        if not self.factor > 0 or not 0 <= self.least <= 1:
            raise SmeltError(f"factor must be above 0 and least between 0 and 1, not {self.factor} and {self.least}")

    @property
    def most(self) -> int:
        return self.nodes


@dataclass(frozen=True)
class Trigrams(Draft):
    """What follows two tokens, from a counted text and the request itself, searched for likely paths (ADED, 2024).

    nodes, depth: of the tree.
    successors: kept for each pair of tokens.
    search: `best` takes the most probable paths first; `mcts` is the published search.
    window, gain, cap: after a step each trigram of the last `window` tokens gains `gain`, to at most `cap`.
    prompt: how much each trigram of the prompt gains at first; the published code takes in its last tokens alone.
    iterations, keep, explore, scale: of `mcts` (s, top_k, c1 and c2 of the released code).
    Tables `trigrams.pairs` int64 [R], sorted, a · V + b; `.tokens` int32 and `.weights` float32 [R, successors].
    """

    nodes: int = 24
    depth: int = 5
    successors: int = 12
    search: Literal["best", "mcts"] = "best"
    window: int = 16
    gain: float = 0.04
    cap: float = 3.0
    prompt: float = 0.5
    iterations: int = 150
    keep: int = 24
    explore: float = 32.0
    scale: float = 8.0

    def __post_init__(self) -> None:
        _positive(self, "nodes", "depth", "successors", "window", "iterations", "keep")

    @property
    def most(self) -> int:
        return self.nodes


@dataclass(frozen=True)
class Lookahead(Draft):
    """N-grams of a Jacobi window that runs beside the verified tokens (Lookahead Decoding, Fu et al., 2024).

    window: columns; ngram: tokens of an n-gram, one more than the window has levels; guesses: n-grams that are verified
    at once, and kept for each first token.
    """

    window: int = 7
    ngram: int = 5
    guesses: int = 7

    def __post_init__(self) -> None:
        _positive(self, "window", "guesses")
        if self.ngram < 2:
            raise SmeltError(f"an n-gram has 2 tokens or more, not {self.ngram}")

    @property
    def most(self) -> int:
        return (self.window + self.guesses) * (self.ngram - 1)


@dataclass(frozen=True)
class Jacobi(Draft):
    """A window of guesses, each drawn anew behind the former ones until it stands still (Speculative Jacobi, 2024).

    window: tokens of the window.
    """

    window: int = 16

    def __post_init__(self) -> None:
        _positive(self, "window")

    @property
    def most(self) -> int:
        return self.window


@dataclass(frozen=True)
class Model(Draft):
    """A smaller decoder, the program's `draft`, draws tokens from its own law behind every node of a tree.

    tree: of a fixed shape; node j of rank r holds the r-th draw at its parent (Sequoia, Chen et al., 2024).
    width, depth: without a fixed shape every level draws `width` tokens, where the model's own law says that they are
        likeliest to be reached: the value of a draw is fixed before it is made (DySpec, Xiong et al., 2024).
    draws: `coupled` uses the verifier's noise, so that both models often choose alike and nothing is left to chance;
        `distinct` draws without repetition, `iid` draws `width` chains of their own (SpecTr, SpecInfer).
    entropy: nats; the draft ends where the mean entropy of the last `window` laws lies above.
    """

    tree: Tree | None = None
    width: int = 1
    depth: int = 4
    draws: Literal["coupled", "distinct", "iid"] = "coupled"
    entropy: float | None = None
    window: int = 5

    def __post_init__(self) -> None:
        _positive(self, "width", "depth", "window")
        if self.draws == "iid" and self.tree is not None:
            raise SmeltError("independent draws make chains: give width and depth, and no tree")
        if self.entropy is not None and (self.width > 1 or self.tree is not None):
            raise SmeltError("a draft that ends by entropy is a chain: leave out width and tree")

    @property
    def proposal(self) -> Proposal:
        return "fixed" if self.draws == "coupled" else self.draws

    @property
    def most(self) -> int:
        return len(self.tree) - 1 if self.tree is not None else self.width * self.depth


@dataclass(frozen=True)
class Union(Draft):
    """Several drafters whose trees grow together, the likeliest `nodes` of them all in a step.

    Without a limit a step has 64 rows, with the pending token.
    """

    drafts: tuple[Draft, ...]
    nodes: int = 63

    def __post_init__(self) -> None:
        _positive(self, "nodes")
        if len(self.drafts) < 2:
            raise SmeltError("a union joins two drafters or more")
        if strange := [kind(d) for d in self.drafts if not d.joins]:
            raise SmeltError(f"a union joins drafts that are fixed by their context, which '{strange[0]}' is not")

    @property
    def most(self) -> int:
        return min(self.nodes, sum(draft.most for draft in self.drafts))

    @property
    def parts(self) -> tuple[Draft, ...]:
        return self.drafts


KINDS: dict[str, type[Draft]] = {
    "recycle": Recycle,
    "heads": Heads,
    "fused": Fused,
    "prompts": Prompts,
    "lookup": Lookup,
    "suffix": Suffix,
    "trigrams": Trigrams,
    "lookahead": Lookahead,
    "jacobi": Jacobi,
    "model": Model,
    "union": Union,
}


def kind(draft: Draft) -> str:
    """The name of a draft's kind."""
    return next(name for name, each in KINDS.items() if type(draft) is each)


def _check_ranks(tree: Tree, width: int) -> None:
    if max(tree.ranks) >= width:
        raise SmeltError(f"the draft tree uses rank {max(tree.ranks)}, but the drafter keeps {width}")


def _positive(draft: Draft, *names: str) -> None:
    for name in names:
        if getattr(draft, name) < 1:
            raise SmeltError(f"{name} counts from 1, not {getattr(draft, name)}")
