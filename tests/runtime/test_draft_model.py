"""Draft models: the walk stays plain decoding to the token, other rules keep the law, and wrong ones are caught."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir import decode
from smelt.ir.blocks import blocks
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.verify import verify
from smelt.passes.decode.accept import Accept
from smelt.passes.decode.draft import Draft
from smelt.passes.decode.relax import Relax
from smelt.passes.decode.skip import Skip
from smelt.runtime import accept, artefact
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured

NEW = 24
PROMPTS = [
    torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (3, 1, 17)
]
SAMPLINGS = {
    "greedy": Sampling(),
    "hot": Sampling(temperature=1.2, seed=2),
    "top p": Sampling(temperature=0.9, top_p=0.8, seed=3),
}
SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"depth": 3},
    "grown": {"width": 3, "depth": 2},
    "shaped": {"rates": (0.6, 0.2), "nodes": 6, "depth": 3},
}


def drafting(**options: Any) -> Program:
    program = cached(captured("llama"), dense="float32")
    Skip(layers=(1,)).apply(program, None)
    Draft(**options).apply(program, None)
    verify(program)
    return program


@cache
def plan(name: str, draws: str) -> Plan:
    return lower(drafting(**SHAPES[name], draws=draws))


def decoded(plan: Plan, sampling: Sampling, prompts: Any = None, new: int = NEW, speculate: bool = True) -> Decoding:
    prompts = PROMPTS if prompts is None else prompts
    session = Session(plan, len(prompts), max(map(len, prompts)) + new - 1)
    made = Decoding(session, prompts, sampling, Limits(new), speculate)
    for _ in made.run():
        pass
    return made


def tokens(made: Decoding) -> list[list[int]]:
    return [row.tokens for row in made.rows]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_drafts_change_no_token(shape: str, sampling: Sampling) -> None:
    made = decoded(plan(shape, "coupled"), sampling)
    assert tokens(made) == tokens(decoded(plan(shape, "coupled"), sampling, speculate=False))
    assert made.counts.steps <= NEW - 1


def test_the_model_itself_drafts_what_it_will_say() -> None:
    """A draft model that leaves nothing out is always right under coupling, and nearly always under distinct draws."""
    program = cached(captured("llama"), dense="float32")
    program.draft = program.fork()
    Draft(depth=3).apply(program, None)
    for sampling in SAMPLINGS.values():
        made = decoded(lower(program), sampling, new=1 + 4 * 5)
        assert made.counts.steps == 5, sampling
    program.decode = DecodePlan(decode.Model(None, 1, 3, "distinct"), decode.Reject())
    assert decoded(lower(program), SAMPLINGS["hot"], new=1 + 4 * 5).counts.steps <= 6


LAWFUL = [("chain", "distinct"), ("grown", "distinct"), ("shaped", "distinct"), ("grown", "iid")]
MANY = [PROMPTS[2]] * 200


def deviation(plan: Plan, rule: decode.Accept) -> float:
    """How far the surprise of what was sampled is from its mean, in standard deviations.

    Every token's own law is known: the model's, behind what came before.
    """
    assert plan.program.decode is not None
    plan.program.decode = DecodePlan(plan.program.decode.draft, rule)
    rows = tokens(decoded(plan, Sampling(temperature=1.0, seed=5), MANY, 9))
    fed, start = torch.tensor(rows), len(PROMPTS[2])
    positions = torch.arange(start, start + 7).repeat(len(rows), 1)
    session = Session(plan, len(rows), 64, nodes=8)
    session.prefill([PROMPTS[2] for _ in rows])
    logits = session.step(fed[:, :7].contiguous(), positions)["logits"]
    laws = logits.double().softmax(-1)  # behind tokens 0 to 6: of tokens 1 to 7
    surprise = -laws.log()
    mean = (laws * surprise).sum(-1)
    variance = (laws * surprise.square()).sum(-1) - mean.square()
    excess = surprise.gather(-1, fed[:, 1:8, None])[..., 0] - mean
    return abs(float(excess.sum())) / math.sqrt(float(variance.sum()))


@pytest.mark.parametrize(("shape", "draws"), LAWFUL)
def test_drawn_drafts_keep_the_models_law(shape: str, draws: str) -> None:
    rules = [decode.Walk(), decode.Reject()] + ([decode.KSequential()] if draws == "iid" else [])
    for rule in rules:
        assert deviation(lower(drafting(**SHAPES[shape], draws=draws)), rule) < 4, rule


def test_a_likeliest_child_with_a_soft_law_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.runtime.drafters import model

    monkeypatch.setattr(model.ModelDrafter, "_noise", lambda self, row, at, size, stream: torch.zeros(size))
    made = lower(drafting(**SHAPES["chain"], draws="distinct"))
    assert deviation(made, decode.Reject()) > 6


def test_drafts_that_are_never_refused_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept.Standing, "coins", lambda self, row, count: [0.0] * count)
    made = lower(drafting(**SHAPES["grown"], draws="iid"))
    assert deviation(made, decode.Reject()) > 6


def test_an_artefact_holds_the_draft_model_and_shared_weights_once(tmp_path: Path) -> None:
    program = drafting(depth=2)
    artefact.save(tmp_path / "out", program, {}, {})
    loaded, manifest = artefact.load(tmp_path / "out")
    assert same_program(program, loaded) is None and loaded.nbytes == program.nbytes
    assert all(set(entry) == {"of"} for entry in manifest["draft"].values())
    wanted = tokens(decoded(lower(program), SAMPLINGS["hot"]))
    assert tokens(decoded(lower(loaded), SAMPLINGS["hot"])) == wanted
    without = loaded.fork()
    without.draft = None
    assert same_program(program, without) == "draft: one side has a draft model, the other has none"
    with pytest.raises(SmeltError, match="drafts come from a draft model, which the program does not have"):
        verify(without)


def test_trust_takes_the_draft_and_entropy_ends_it() -> None:
    program = drafting(depth=3, entropy=1e-6, window=1)
    Relax("trust").apply(program, None)
    alone = decoded(lower(program), Sampling())
    assert alone.counts.steps == NEW - 1  # never sure enough: the model itself
    assert tokens(alone) == tokens(decoded(lower(program), Sampling(), speculate=False))
    program = drafting(depth=3, entropy=1e6)
    Relax("trust").apply(program, None)
    made = decoded(lower(program), Sampling(), new=1 + 4 * 5)
    assert made.counts.steps == 5
    draft = lower(program.draft)  # type: ignore[union-attr]
    small = tokens(decoded(draft, Sampling(), [[*PROMPTS[0], *tokens(made)[0][:1]]], 3))
    assert tokens(made)[0][1:4] == small[0]


def test_blocks_are_found_and_left_out() -> None:
    program = cached(captured("llama"), dense="float32")
    found = blocks(program)
    assert [(b.kind, b.layer) for b in found] == [
        (kind, layer) for layer in (0, 1) for kind in ("attention", "feedforward")
    ]
    outcome = Skip(feedforward=(1,)).apply(program, None)
    assert outcome.done == ("layer 1, feedforward",) and 0 < outcome.notes["bytes"] < 1
    assert program.draft is not None
    assert [(b.kind, b.layer) for b in blocks(program.draft)] == [
        ("attention", 0),
        ("feedforward", 0),
        ("attention", 1),
    ]
    assert all(program.draft.weights[name] is program.weights[name] for name in program.draft.weights)
    assert len(program.draft.cache.sites) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2", "mixtral"])
def test_other_families_can_leave_layers_out(family: str) -> None:
    program = cached(captured(family), dense="float32")
    Skip(layers=(1,)).apply(program, None)
    Draft(depth=2).apply(program, None)
    verify(program)
    assert len(program.draft.cache.sites) == len(program.cache.sites) - 1  # type: ignore[union-attr]
    made = decoded(lower(program), SAMPLINGS["hot"])
    assert tokens(made) == tokens(decoded(lower(program), SAMPLINGS["hot"], speculate=False))


@pytest.mark.parametrize(
    ("pass_", "says"),
    [
        (Skip(layers=(7,)), "layer 7 must be one of the 2 layers of llama, counted from 0"),
        (Skip(layers=(0, 1)), "one layer must stay at least"),
        (Draft(), "llama must have a draft model: put decode.skip in front, or pass draft=… to compile"),
        (Accept(), "llama must draft: put a step such as decode.draft in front"),
    ],
)
def test_what_does_not_fit_is_said(pass_: Any, says: str) -> None:
    assert says in list(pass_.requires(cached(captured("llama"), dense="float32")))


def test_rules_are_checked_against_drafts() -> None:
    program = drafting(depth=2)
    assert list(Accept("reject").requires(program)) == []
    (said,) = Accept("k_sequential").requires(program)
    assert "llama drafts by model: acceptance by k_sequential is not valid for the drafts of model" in said
    other = cached(captured("llama"), dense="float32")
    other.draft = cached(captured("gpt2"), dense="float32")
    other.draft.facts["vocabulary"] = 98
    assert "the draft model must have the vocabulary of 97 tokens, but has 98" in list(Draft().requires(other))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Draft(rates=(0.0,)), "rates are in"),
        (lambda: Draft(width=0), "width counts from 1"),
        (lambda: Draft(width=2, entropy=1.0), "a draft that ends by entropy is a chain"),
        (lambda: decode.Model(Tree.from_paths([(0,)]), draws="iid"), "independent draws make chains"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Any, says: str) -> None:
    with pytest.raises(SmeltError, match=says):
        make()
