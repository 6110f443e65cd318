"""Target triton over a device with a memory of its own: no op mixes it with the host's, and results stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smelt.codegen import attention_triton
from smelt.codegen.attention_triton import TritonAttention
from smelt.codegen.lower import lower
from smelt.ir.cache.schedule import Schedule
from smelt.runtime import bound_triton
from smelt.runtime.bound_triton import TritonBound
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling
from smelt.runtime.session import Session

from ..codegen.triton_checks import compiled, in_the_interpreter, interpreted
from ..ir.programs import cached, captured
from .test_triton_target import TIES, TOLERANCE, Recorded, off, program, session, stepped
from .two_memories import THERE, Mixed, TwoMemories, two_memories

pytest.importorskip("triton", reason="triton is not installed")


RECIPES = ("none", "w4a8", "quantized-pruning", "coded")


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMemories]:
    """Whatever a test captures before it asks for this lies on the host."""
    for recipe in (*RECIPES, "token-recycling"):
        program(recipe)
    monkeypatch.setattr(attention_triton, "INTERPRETED", 2)
    monkeypatch.setattr(TritonAttention, "_programs", lambda self, device: 2)
    monkeypatch.setattr(TritonBound, "_capture", lambda self: Recorded(self))
    with two_memories(monkeypatch) as mode:
        yield mode


@interpreted
@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_mix_no_memories(recipe: str, memories: TwoMemories) -> None:
    """Two pages leave the small cache on the way, the second between replays."""
    steps = 5 if recipe == "quantized-pruning" else 3
    wanted = stepped(session(recipe, "torch"), steps)
    ours = session(recipe, "triton")
    memories.waits.clear()  # to make a cache may take as long as it takes
    assert off(stepped(ours, steps), wanted) < (TIES if recipe == "w4a8" else TOLERANCE)
    assert ours.plan.device == THERE and isinstance(ours.bound(1), TritonBound) and ours.bound(1).captured
    assert not memories.waits


@interpreted
def test_trees_and_ragged_rows_mix_no_memories(memories: TwoMemories) -> None:
    wanted = stepped(session("coded", "torch", 2), 2, rows=2, tree=True)
    assert off(stepped(session("coded", "triton", 2), 2, rows=2, tree=True), wanted) < TOLERANCE


@interpreted
@pytest.mark.parametrize(("recipe", "temperature"), [("none", 0.8), ("token-recycling", 0.0)])
def test_generating_mixes_no_memories(recipe: str, temperature: float, memories: TwoMemories) -> None:
    """Choice on the host and on the device; drafts and their walk."""
    made = []
    for target in ("torch", "triton"):
        sampling = Sampling(temperature=temperature, repetition_penalty=1.1 if temperature else 1.0)
        made.append(list(Decoding(session(recipe, target), [[3, 4, 3, 4]], sampling, Limits(4)).run()))  # type: ignore[arg-type]
    assert made[0] == made[1]


@interpreted
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_mix_no_memories(family: str, request: pytest.FixtureRequest) -> None:
    """Experts are chosen by values: torch computes those on the device."""
    made = cached(captured(family))
    request.getfixturevalue("memories")
    found, wanted = (stepped(Session(lower(made, target), 1, 32), 1) for target in ("triton", "torch"))  # type: ignore[arg-type]
    assert off(found, wanted) < TOLERANCE


@interpreted
@pytest.mark.parametrize("wrong", ["counts", "inputs", "results", "table"])
def test_a_tensor_on_the_wrong_side_is_caught(
    wrong: str, memories: TwoMemories, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "counts":
        hold = Schedule._hold
        here = torch.device("cpu")
        monkeypatch.setattr(Schedule, "_hold", lambda self, counts, host, device: hold(self, counts, host, here))
    elif wrong == "inputs":
        start = bound_triton.Mirror.__init__

        def init(self: Any, likes: Any, device: torch.device) -> None:
            start(self, likes, device)
            self.there = self.here

        monkeypatch.setattr(bound_triton.Mirror, "__init__", init)
    elif wrong == "results":
        monkeypatch.setattr(bound_triton, "_on_host", lambda like, device: like)
    else:
        monkeypatch.setattr(TritonBound, "_table", lambda self, name: torch.ones(8))
    with pytest.raises(Mixed):
        stepped(session("none", "triton"), 0)[0] + torch.zeros(1)


@interpreted
def test_what_the_stand_in_refuses(memories: TwoMemories) -> None:
    here, there = torch.arange(3), torch.arange(3, device="cuda")
    assert (here.device.type, there.device.type, there[1:].device.type, (there + 1).device.type) == (
        "cpu",
        *["cuda"] * 3,
    )
    assert there.cpu().device.type == "cpu" and here.to("cuda").device.type == "cuda"
    assert torch.equal(there[here], there) and here.clone().copy_(there).device.type == "cpu"
    for mixed in (lambda: here + there, lambda: here[there], lambda: torch.cat([here, there])):
        with pytest.raises(Mixed):
            mixed()
    before = len(memories.waits)
    assert int(there[1]) == 1 and len(memories.waits) > before


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)
