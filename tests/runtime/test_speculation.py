"""Speculation is exact: whatever is drafted, every row gets the tokens of plain decoding, in fewer steps or as many."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir import decode as plans
from smelt.ir.cache import Cache, Select
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine
from smelt.passes.decode.heads import Heads
from smelt.passes.decode.recycle import Recycle
from smelt.runtime import generate, trees
from smelt.runtime.drafters.base import Drafted, Drafter, Verified
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured, quantized

VOCABULARY, NEW = 97, 40
PROMPTS = [
    torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 1, 17, 40)
]
SAMPLINGS = {
    "greedy": Sampling(),
    "cool": Sampling(temperature=0.7, seed=1),
    "hot": Sampling(temperature=1.3, seed=2),
    "top p": Sampling(temperature=0.9, top_p=0.8, seed=3),
    "typical": Sampling(temperature=1.0, typical_p=0.7, top_k=40, seed=4),
    "penalty": Sampling(repetition_penalty=1.3),
    "warm penalty": Sampling(temperature=0.8, min_p=0.05, repetition_penalty=0.8, seed=5),
}
# pages of 6 leave a tail of 8 to 13, so that some leave in the middle of every generation
PAGED: dict[str, Any] = {"sink": 2, "tail": 8, "page": 6}
CODED: dict[str, Any] = {
    "keys": Affine(8, 3, "channel", True),
    "values": Affine(8, 16),
    "select": Select("key_norm", 0.5),
}


class Case(NamedTuple):
    """A small model and how it is stored."""

    stored: str = "float32"
    bits: int | None = None
    drafter: str = "recycle"
    family: str = "llama"


DENSE, COMPRESSED = Case(), Case("compressed")
CASES = {
    "dense": DENSE,
    "4-bit weights": Case("float16", 4),
    "compressed": COMPRESSED,
    "compressed, 4-bit weights": Case("compressed", 4),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@cache
def plan(case: Case) -> Plan:
    program = captured(case.family)
    program = program if case.bits is None else quantized(program, Affine(case.bits, 32))
    program = cached(program, **(PAGED | CODED if case.stored == "compressed" else {"dense": case.stored}))
    (Recycle(4, 14) if case.drafter == "recycle" else Heads(3, 4, 12)).apply(program, None)
    return lower(program)


def tree_of(case: Case) -> Tree:
    decoding = plan(case).program.decode
    assert decoding is not None and isinstance(decoding.draft, plans.Recycle | plans.Heads)
    return decoding.draft.tree


def decode(case: Case, sampling: Sampling, speculate: bool = True, new: int = NEW, eos: Any = ()) -> Decoding:
    session = Session(plan(case), len(PROMPTS), max(map(len, PROMPTS)) + new - 1)
    made = Decoding(session, PROMPTS, sampling, Limits(new, frozenset(eos)), speculate)
    for _ in made.run():
        pass
    assert made.counts.tokens == sum(len(row.tokens) for row in made.rows) - len(PROMPTS)
    return made


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@cache
def plain(case: Case, sampling: Sampling, new: int = NEW) -> list[list[int]]:
    made = decode(case, sampling, False, new)
    assert made.counts.steps == new - 1
    return tokens(made)


class Scripted(Drafter):
    """A drafter that knows what plain decoding gives, and drafts by it: `draft(truth, depth, rank)` fills a node."""

    fixed = True

    def __init__(self, answers: list[list[int]], tree: Tree, draft: Callable[[int, int, int], int]) -> None:
        self.answers, self.tree, self.draft = answers, tree, draft
        self.done = [1] * len(answers)  # tokens that a row has

    def observe(self, row: int, verified: Verified) -> None:
        self.done[row] += len(verified.fresh)

    def propose(self, row: int) -> Drafted:
        rest = self.answers[row][self.done[row] - 1 :] + [0] * 20
        places = list(zip(self.tree.depths, self.tree.ranks, strict=True))[1:]
        return Drafted([rest[0], *(self.draft(rest[depth], depth, rank) for depth, rank in places)], self.tree.parents)


_random = torch.Generator().manual_seed(7)
SCRIPTS: dict[str, Callable[[int, int, int], int]] = {
    "oracle": lambda truth, depth, rank: truth if rank == 0 else (truth + rank) % VOCABULARY,
    "oracle at the last rank": lambda truth, depth, rank: truth if rank == 1 else (truth + 1) % VOCABULARY,
    "duplicates": lambda truth, depth, rank: truth,
    "adversary": lambda truth, depth, rank: (truth + 1 + rank) % VOCABULARY,
    "right once": lambda truth, depth, rank: truth if depth < 2 else (truth + 1) % VOCABULARY,
    "random": lambda truth, depth, rank: (truth + int(torch.randint(0, 3, (1,), generator=_random))) % VOCABULARY,
}


def scripted(patch: pytest.MonkeyPatch, case: Case, sampling: Sampling, script: str, new: int = NEW) -> Decoding:
    """A generation whose drafts follow a script."""
    answers, tree = plain(case, sampling, new), tree_of(case)
    patch.setattr(generate, "drafter", lambda *_: Scripted(answers, tree, SCRIPTS[script]))
    return decode(case, sampling, new=new)


@every_case
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("drafter", ["recycle", "heads"])
def test_drafts_of_the_recipes_change_no_token(case: Case, sampling: Sampling, drafter: str) -> None:
    case = case._replace(drafter=drafter)
    made = decode(case, sampling)
    assert tokens(made) == plain(case, sampling)
    assert made.counts.steps <= NEW - 1


DRAFTS: dict[str, plans.Draft] = {
    "lookup": plans.Lookup(branches=2, tokens=4),
    "suffix": plans.Suffix(nodes=6),
    "trigrams": plans.Trigrams(nodes=9),
    "lookahead": plans.Lookahead(3, 3, 2),
    "jacobi": plans.Jacobi(5),
    "published trigrams": plans.Trigrams(nodes=9, search="mcts", iterations=20),
}
UNION = plans.Union(
    (plans.Recycle(Tree.from_paths([(0,), (1,), (0, 0)]), 2), *(draft for draft in DRAFTS.values() if draft.joins)),
    nodes=7,
)


@pytest.mark.parametrize("case", [DENSE, CASES["compressed, 4-bit weights"]], ids=["dense", "compressed"])
@pytest.mark.parametrize("draft", [*DRAFTS.values(), UNION], ids=[*DRAFTS, "union"])
def test_drafts_that_change_shape_change_no_token(
    case: Case, draft: plans.Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {sampling: plain(case, sampling) for sampling in SAMPLINGS.values()}
    monkeypatch.setattr(plan(case).program, "decode", DecodePlan(draft))
    for sampling, answer in wanted.items():
        made = decode(case, sampling)
        assert tokens(made) == answer and made.counts.steps <= NEW - 1, sampling


@every_case
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_draft_changes_a_token(case: Case, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for sampling in SAMPLINGS.values():
        assert tokens(scripted(monkeypatch, case, sampling, script)) == plain(case, sampling), sampling


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral", "gemma2"])
def test_other_families_are_exact_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family=family)
    for sampling in (SAMPLINGS["greedy"], SAMPLINGS["hot"]):
        assert tokens(decode(case, sampling)) == plain(case, sampling)
        with monkeypatch.context() as patch:
            assert tokens(scripted(patch, case, sampling, "random")) == plain(case, sampling)


@pytest.mark.parametrize("sampling", [SAMPLINGS["greedy"], SAMPLINGS["hot"]], ids=["greedy", "hot"])
def test_right_drafts_give_a_token_for_each_level_and_wrong_ones_a_token_a_step(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, deepest = DENSE, max(tree_of(DENSE).depths)
    new = 1 + 6 * (deepest + 1)
    for script, steps in (("oracle", 6), ("duplicates", 6), ("adversary", new - 1), ("right once", (new - 1) / 2)):
        made = scripted(monkeypatch, case, sampling, script, new)
        assert (made.counts.steps, made.counts.tokens) == (steps, len(PROMPTS) * (new - 1)), script


def test_an_end_token_ends_a_row_in_the_middle_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    case, sampling = DENSE, SAMPLINGS["hot"]
    full = plain(case, sampling)
    ends = {full[0][5], full[2][8]}
    script = Scripted(full, tree_of(case), SCRIPTS["oracle"])
    monkeypatch.setattr(generate, "drafter", lambda *_: script)
    made = decode(case, sampling, eos=ends)
    assert tokens(made) == tokens(decode(case, sampling, False, eos=ends))
    assert {row.reason for row in made.rows} >= {"eos"}


def test_the_context_ends_under_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree may reach beyond the last position: those nodes are not read, and no row goes further than it may."""
    case, sampling = COMPRESSED, SAMPLINGS["hot"]
    for new in (1, 2, 3, 4):
        made = scripted(monkeypatch, case, sampling, "oracle", new)
        assert tokens(made) == plain(case, sampling, new)
        assert made.session.cache.capacity == len(PROMPTS[3]) + new - 1 == made.session.cache.lengths[3]


def caught(patch: pytest.MonkeyPatch, case: Case, scripts: tuple[str, ...] = ("oracle", "random")) -> bool:
    """Whether some generation differs from plain decoding; the answers are made before, by the right code."""
    for sampling in (SAMPLINGS["greedy"], SAMPLINGS["hot"], SAMPLINGS["penalty"]):
        for script in scripts:
            if tokens(scripted(patch, case, sampling, script)) != plain(case, sampling):
                return True
    return False


def prepared(case: Case) -> Case:
    """The case, plainly decoded before anything is broken."""
    for sampling in (SAMPLINGS["greedy"], SAMPLINGS["hot"], SAMPLINGS["penalty"]):
        plain(case, sampling)
    return case


@pytest.mark.parametrize("case", [DENSE, COMPRESSED], ids=["dense", "compressed"])
def test_a_position_off_by_one_is_caught(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, right = prepared(case), trees.depths
    monkeypatch.setattr(trees, "depths", lambda *tree: right(*tree) + (right(*tree) > 0))
    assert caught(monkeypatch, case)


def test_a_path_across_a_page_that_leaves_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = prepared(COMPRESSED)
    monkeypatch.setattr(Cache, "room", lambda self: [self.capacity - length for length in self.lengths])
    assert caught(monkeypatch, case, ("oracle",))


@pytest.mark.parametrize("case", [DENSE, COMPRESSED], ids=["dense", "compressed"])
def test_a_causal_mask_in_place_of_the_tree_is_caught(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(case)
    right = trees.ancestors
    monkeypatch.setattr(trees, "ancestors", lambda *tree: torch.ones_like(right(*tree)).tril())
    assert caught(monkeypatch, case)


def test_a_child_taken_without_a_look_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = prepared(DENSE), Decoding._walk

    def careless(self: Decoding, tree: trees.Trees, positions: torch.Tensor, outputs: Any, chosen: Any) -> Any:
        paths, fresh = right(self, tree, positions, outputs, chosen)
        for number, path in enumerate(paths):
            below = tree.below(number, 0).nodes
            if len(path) == 1 and below and len(self.rows[number].tokens) + 2 <= NEW:
                path.append(below[0])
                fresh[number].append(int(outputs["logits"][number, path[-1]].argmax()))
        return paths, fresh

    monkeypatch.setattr(Decoding, "_walk", careless)
    assert caught(monkeypatch, case, ("adversary",))
