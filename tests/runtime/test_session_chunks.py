"""Sessions that read prompts in chunks with the question behind each: equal to the interpreter, and row by row."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from smelt.codegen.lower import lower
from smelt.codegen.plan import Plan
from smelt.ir.errors import SmeltError
from smelt.passes.cache.insert import Insert
from smelt.passes.cache.parallel import Parallel
from smelt.passes.cache.score import Score
from smelt.passes.cache.select import Select
from smelt.passes.cache.transform import Transform
from smelt.passes.measure import replay
from smelt.runtime.session import Session

from ..ir.programs import captured

QUESTION, LENGTHS = 6, (75, 3, 22, 23, 600)
SMALL = {"keep": 0.25, "when": "prompt", "sink": 2, "tail": 6, "page": 8, "skip_layers": ()}


@cache
def plan(chunk: int | None, target: str = "cpp") -> Plan:
    program = captured("llama")
    steps = Insert(dtype="float32"), Transform(compact=True), Score(queries=QUESTION, normalize="length")
    for step in (*steps, Select(**SMALL, chunk=chunk)):
        assert list(step.requires(program)) == []
        step.apply(program, None)
    return lower(program, target)


def prompt(length: int) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def after(session: Session, prompts: list[list[int]]) -> torch.Tensor:
    """Logits [B, 2, V] behind the prompts, and behind one token more."""
    first = session.prefill(prompts)["logits"].clone()
    positions = torch.tensor(session.cache.lengths)[:, None]
    return torch.stack([first, session.step(torch.full_like(positions, 5), positions)["logits"][:, 0]], 1)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_kernels_the_torch_target_and_the_interpreter_read_alike() -> None:
    row = prompt(75)
    found = after(Session(plan(16), 1, 128), [row])
    assert off(found, after(Session(plan(16, "torch"), 1, 128), [row])) < 1e-5
    meant = replay(plan(16).program, torch.tensor([[*row, 5, 0]]), 75)
    assert off(found[:, 1], meant[:, 0]) < 1e-5
    assert off(found, after(Session(plan(None), 1, 128), [row])) > 1e-3


def test_a_chunk_that_holds_the_prompt_changes_no_bit() -> None:
    rows = [prompt(length) for length in LENGTHS]
    wanted = after(Session(plan(None), len(rows), 640), rows)
    assert torch.equal(after(Session(plan(594), len(rows), 640), rows), wanted)
    assert not torch.equal(after(Session(plan(593), len(rows), 640), rows), wanted)


@pytest.mark.parametrize("chunk", [16, 560])  # the larger is read in two pieces
def test_a_row_of_a_ragged_batch_equals_the_row_alone(chunk: int) -> None:
    rows = [prompt(length) for length in LENGTHS]
    session = Session(plan(chunk), len(rows), 640)
    together = after(session, rows)
    session.cache.restart()  # nothing of what was chunked is left behind
    assert torch.equal(after(session, rows), together)
    for number, row in enumerate(rows):
        assert torch.equal(after(Session(plan(chunk), 1, 640), [row])[0], together[number])


def test_every_prompt_token_is_harvested_once() -> None:
    rows, seen = [prompt(length) for length in LENGTHS], [[] for _ in LENGTHS]
    Session(plan(16), len(rows), 640).prefill(rows, lambda row, tokens, logits: seen[row].extend(tokens.tolist()))
    assert seen == rows


def test_pieces_of_a_prompt_are_refused() -> None:
    with pytest.raises(SmeltError, match="all of a prompt must be there: read it as one piece, or set chunk"):
        Session(plan(16), 1, 64).prefill([prompt(9)], end=False)
    reason = "pieces that are read apart have no question behind them"
    assert any(reason in why for why in Parallel().requires(plan(16).program))
    program = plan(None).program.fork()
    program.facts["parallel"] = {"sink": 4}
    assert any(reason in why for why in Select(**SMALL, chunk=16).requires(program))
