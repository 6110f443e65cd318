"""Prompts through a session whose plan approximates long ones: fed whole, exact in pieces, padded, and guarded."""

from dataclasses import replace

import pytest
import torch

import smelt
from smelt.codegen.hyper import HyperAttention
from smelt.codegen.lower import lower
from smelt.ir import decode as drafts
from smelt.ir.cache import Cache, CachePlan, Hyper
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.runtime import session
from smelt.runtime.session import Session

from ..tiny import model

OPTIONS = Hyper(block=32, sample=32, projections=6, min_seq_len=64)
LENGTHS = [200, 64, 131]
TOLERANCE = 2e-4  # logits of size 10 behind two layers of fp32 sums


@pytest.fixture(scope="module")
def program() -> Program:
    compiled = smelt.compile(model(), {"name": "r", "family": "cache", "does": "x", "steps": [{"cache.insert": {}}]})
    program = compiled.program
    program.cache = CachePlan(tuple(replace(site, dense="float32", hyper=OPTIONS) for site in program.cache.sites))
    return program


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(4, 4096, (n,), generator=random).tolist() for n in LENGTHS]


def reference(program: Program, given: list[list[int]]) -> torch.Tensor:
    """The last token's logits of each row, read alone by the interpreter."""
    out = []
    for prompt in given:
        tokens, positions = torch.tensor([prompt]), torch.arange(len(prompt))[None]
        cache = Cache(program.cache, 1, 256)
        cache.begin(positions)
        out.append(interpret(program, {"tokens": tokens, "positions": positions}, cache)["logits"][0, -1])
    return torch.stack(out)


def exact(program: Program) -> Program:
    plain = program.fork()
    plain.cache = CachePlan(tuple(replace(site, hyper=None) for site in program.cache.sites))
    return plain


@pytest.mark.parametrize("target", ["cpp", "torch"])
def test_whole_prompts_are_approximated(program, target):
    logits = Session(lower(program, target), len(LENGTHS), 256).prefill(prompts())["logits"]
    want = reference(program, prompts())
    assert (logits - want).abs().max() < TOLERANCE
    off = (want - reference(exact(program), prompts())).abs().amax(1)
    assert off[0] > 100 * TOLERANCE < off[2] and off[1] < TOLERANCE  # 64 tokens are read exactly


def test_logits_of_every_token_are_the_same(program):
    harvested = {}
    reads = Session(lower(program), len(LENGTHS), 256)
    logits = reads.prefill(prompts(), lambda row, tokens, scores: harvested.update({row: scores[-1].clone()}))
    assert (torch.stack([harvested[row] for row in range(3)]) - logits["logits"]).abs().max() < TOLERANCE


def test_a_drafter_does_not_decide_how_prompts_are_read(program, monkeypatch):
    """Where all logits would take too much, nothing is harvested."""
    monkeypatch.setattr(session, "LOGITS", 4096 * 300)
    seen = []
    logits = Session(lower(program), 3, 256).prefill(prompts(), lambda row, tokens, scores: seen.append(row))["logits"]
    assert not seen and (logits - reference(program, prompts())).abs().max() < TOLERANCE


def test_a_prompt_in_pieces_is_exact(program):
    reads, given = Session(lower(program), len(LENGTHS), 256), prompts()
    reads.prefill([prompt[:40] for prompt in given], end=False)
    logits = reads.prefill([prompt[40:] for prompt in given])["logits"]
    assert (logits - reference(exact(program), given)).abs().max() < TOLERANCE


def test_decoding_goes_on_from_what_was_stored(program):
    reads, given = Session(lower(program), 1, 256), prompts()[:1]
    reads.prefill([given[0][:-1]])
    logits = reads.step(torch.tensor([given[0][-1:]]), torch.tensor([[len(given[0]) - 1]]))["logits"][:, 0].clone()
    cache = Cache(program.cache, 1, 256)
    for span in (slice(0, 199), slice(199, 200)):
        tokens, positions = torch.tensor([given[0][span]]), torch.arange(200)[None, span]
        cache.begin(positions)
        want = interpret(program, {"tokens": tokens, "positions": positions}, cache)["logits"][:, -1]
        cache.commit([list(range(positions.shape[1]))])
        cache.end_prefill()
    assert (logits - want).abs().max() < TOLERANCE


def test_the_kernel_is_the_one_that_runs(program, monkeypatch):
    bound = []
    bind = HyperAttention.bind

    def watched(self, *args, **kwargs):
        bound.append(args[1])
        return bind(self, *args, **kwargs)

    monkeypatch.setattr(HyperAttention, "bind", watched)
    Session(lower(program), 1, 256).prefill(prompts()[1:2])
    assert bound == []  # 64 tokens
    Session(lower(program), 1, 256).prefill(prompts()[:1])
    assert bound == [0, 1]


def test_steps_that_draft_more_than_is_exact_are_refused(program):
    drafting = program.fork()
    drafting.decode = DecodePlan(drafts.Recycle(Tree((0,) * 65, (0, *range(64))), 64))
    with pytest.raises(SmeltError, match="layer 0 approximates more than 64 tokens at once, and a step has 65 drafted"):
        Session(lower(drafting), 1, 256)
