"""Blocks left out by position: kernels equal the interpreter, prompts run the whole model, nothing missing is read."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.blocks import stages
from smelt.ir.cache import Cache, Retrieve
from smelt.ir.decode import DecodePlan, Lookup
from smelt.ir.depth import DepthPlan, Stage
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.verify import verify
from smelt.passes.measure import compare, replay
from smelt.runtime import artefact
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..ir.programs import cached, captured, quantized

PROMPTS = [[5, 17, 3, 80, 41], [9, 9, 60]]
NEW, TOLERANCE = 14, 1e-5
# layer 0 without its feed-forward part, then without attention as well; the last page leaves long after that
PLAN = DepthPlan((Stage(2, (), (0,)), Stage(5, (0,), (0, 1))))
# pages of 4 leave a tail of 4 to 8, so that some leave while a layer rests
CODED = {"sink": 2, "tail": 4, "page": 4, "keys": Affine(8, 4, "channel", True), "values": Affine(8, 16)}


def program(depth: DepthPlan | None = PLAN, **options: object) -> Program:
    made = cached(quantized(captured("llama"), Affine(4, 32)), **(options or CODED))
    made.depth = depth
    return made


@cache
def plan(depth: DepthPlan | None = PLAN) -> Plan:
    return lower(program(depth))


def decoded(made: Plan, sampling: Sampling = Sampling()) -> list[list[int]]:  # noqa: B008
    decoding = Decoding(Session(made, len(PROMPTS), 64), PROMPTS, sampling, Limits(NEW))
    for _ in decoding.run():
        pass
    return [row.tokens for row in decoding.rows]


def stepped(made: Plan, tokens: list[int], first: int) -> torch.Tensor:
    """Logits [n, V] behind the tokens from `first` on, fed one at a time behind a prompt."""
    session, out = Session(made, 1, 64), []
    session.prefill([tokens[:first]])
    for at in range(first, len(tokens)):
        out.append(session.step(torch.tensor([[tokens[at]]]), torch.tensor([[at]]))["logits"][0, 0].clone())
        session.cache.commit([[0]])
    return torch.stack(out)


def meant(made: Program, tokens: list[int], first: int) -> torch.Tensor:
    """The same without a session: each token by the program of its stage."""
    store, variants, depth = Cache(made.cache, 1, 64), [made, *stages(made)], made.depth
    out = []
    for start, end in ((0, first), *((at, at + 1) for at in range(first, len(tokens)))):
        stage = depth.at(start - first) if start and depth else 0
        inputs = {"tokens": torch.tensor([tokens[start:end]]), "positions": torch.arange(start, end)[None]}
        store.begin(inputs["positions"])
        out.append(interpret(variants[stage], inputs, store)["logits"][0, -1])
        store.commit([list(range(end - start))])
        store.end_prefill()
    return torch.stack(out[1:])


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


TOKENS = [5, 17, 3, 80, 41, 2, 90, 33, 8, 8, 21, 64, 7, 55, 12, 70]


def test_stages_that_leave_nothing_out_are_the_model_bit_for_bit() -> None:
    whole = plan(DepthPlan((Stage(0), Stage(3))))
    assert torch.equal(stepped(whole, TOKENS, 5), stepped(plan(None), TOKENS, 5))
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=1)):
        assert decoded(whole, sampling) == decoded(plan(None), sampling)


def test_kernels_equal_the_interpreter_in_every_stage() -> None:
    wanted, found = meant(program(), TOKENS, 5), stepped(plan(), TOKENS, 5)
    assert off(found, wanted) < TOLERANCE
    assert off(found, meant(program(None), TOKENS, 5)) > 0.01
    late = DepthPlan(tuple(replace(stage, start=stage.start + 1) for stage in PLAN.stages))
    assert off(found, meant(program(late), TOKENS, 5)) > 0.01
    other = DepthPlan((Stage(2, (), (1,)), Stage(5, (1,), (0, 1))))
    assert off(found, meant(program(other), TOKENS, 5)) > 0.01


def test_the_prompt_and_what_comes_before_the_first_stage_run_the_whole_model() -> None:
    assert torch.equal(stepped(plan(), TOKENS, 5)[:2], stepped(plan(None), TOKENS, 5)[:2])
    text = torch.tensor([TOKENS])
    whole, chunks, steps = replay(program(None), text, 5), replay(program(), text, 5, 4), replay(program(), text, 5)
    assert off(chunks[:, :2], whole[:, :2]) < TOLERANCE and compare(whole, chunks).kl > 1e-4
    assert off(chunks, steps) < TOLERANCE and off(stepped(plan(), TOKENS, 5), steps[0]) < TOLERANCE


def test_a_batch_is_its_rows_and_one_step_at_a_time_is_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    together = decoded(plan())
    assert together != decoded(plan(None))
    monkeypatch.setattr(Session, "chains", False)
    assert decoded(plan()) == together
    for row, prompt in enumerate(PROMPTS):
        decoding = Decoding(Session(plan(), 1, 64), [prompt], Sampling(), Limits(NEW))
        assert [token for _, new in decoding.run() for token in new] == together[row]


def test_a_resting_layer_holds_nothing_and_is_never_read() -> None:
    session = Session(plan(), 1, 64)
    session.prefill([TOKENS[:5]])
    for at in range(5, 12):
        session.step(torch.tensor([[TOKENS[at]]]), torch.tensor([[at]]))
        session.cache.commit([[0]])
    assert session.cache.resting == {0}
    for part in session.cache.segments[0].buffers():
        part.fill_(float("nan") if part.is_floating_point() else 0)
    clean = stepped(plan(), TOKENS, 5)[7]
    assert torch.equal(session.step(torch.tensor([[TOKENS[12]]]), torch.tensor([[12]]))["logits"][0, 0], clean)
    other = Session(plan(None), 1, 64)
    other.prefill([TOKENS[:12]])
    assert 2 * session.cache.nbytes().used == other.cache.nbytes().used
    with pytest.raises(SmeltError, match="which a prompt behind them cannot attend to"):
        session.prefill([[1, 2]])
    session.cache.restart()
    session.prefill([TOKENS[:5]])
    assert not session.cache.resting


def test_stages_share_packed_weights_and_are_saved(tmp_path: Path) -> None:
    made = plan()
    decoded(made)
    packed = [{node.name: parts for _, k in each.regions if hasattr(k, "_packed") for node, parts in k._packed.items()}
              for each in (made, *made.stages)]  # fmt: skip
    for shallow in packed[1:]:
        assert shallow and all(parts is packed[0][name] for name, parts in shallow.items())
    artefact.save(tmp_path / "a", made.program, {}, {})
    again, _ = artefact.load(tmp_path / "a")
    assert again.depth == PLAN and same_program(again, made.program) is None
    again.depth = None
    assert same_program(again, made.program) is not None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SmeltError, match="layer 1 rests from token 0 on, so it stores nothing that token 3 could"):
        DepthPlan((Stage(0, (1,)), Stage(3, (0,))))
    with pytest.raises(SmeltError, match=r"growing numbers of tokens from 0, not at \[3, 3\]"):
        DepthPlan((Stage(3), Stage(3)))
    with pytest.raises(SmeltError, match="there is no attention of layer 2 that could be left out"):
        verify(program(DepthPlan((Stage(0, (2,)),))))
    with pytest.raises(SmeltError, match="nothing is left to run from token 4 on"):
        verify(program(DepthPlan((Stage(4, (0, 1), (0, 1)),))))
    drafting = program()
    drafting.decode = DecodePlan(Lookup())
    with pytest.raises(SmeltError, match="drop the drafter"):
        verify(drafting)
    reading = program()
    first, second = reading.cache.sites  # type: ignore[union-attr]
    lists = [replace(first, retrieve=Retrieve("scan", 4)), replace(second, retrieve=Retrieve("reuse", 4, 0))]
    faults = list(PLAN.faults(replace(reading.cache, sites=tuple(lists))))  # type: ignore[type-var]
    assert faults == ["layer 1 reads the list of layer 0, whose attention is left out while its own is not"]
