"""Target triton chooses tokens on its device: those of the reference, and what nobody reads stays there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from smelt.codegen import attention_triton
from smelt.codegen.choose_triton import TritonChooser
from smelt.codegen.plan import Target
from smelt.runtime import bound_triton
from smelt.runtime.bound_triton import Mirror, TritonBound
from smelt.runtime.generate import Decoding, Limits
from smelt.runtime.sampling import Sampling, choose
from smelt.runtime.session import Draw, Session

from ..codegen.triton_checks import compiled, in_the_interpreter, interpreted
from .test_triton_target import RECIPES, WIDE, Recorded, session

pytest.importorskip("triton", reason="triton is not installed")

PROMPTS = [[9, 9], [30]]  # the first one goes on with nines, which lookup drafts
SETTINGS = [Sampling(), Sampling(temperature=1.0, seed=2**64 - 5)]
ASKED = torch.tensor([4]), torch.tensor([[7]]), torch.tensor([[2]])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs of attention; and drafts that are made without a look at logits, unlike `token-recycling`'s."""
    monkeypatch.setattr(attention_triton, "INTERPRETED", 1)
    monkeypatch.setitem(RECIPES, "prompt-lookup", WIDE)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The temperatures that kernels were told to choose at, a step each."""
    told: list[float] = []
    start = TritonChooser.start

    def noted(self: TritonChooser, seed: int, temperature: float, requests: torch.Tensor, logits: bool) -> None:
        told.append(temperature)
        start(self, seed, temperature, requests, logits)

    monkeypatch.setattr(TritonChooser, "start", noted)
    yield told


def generated(on: Session, sampling: Sampling, new: int = 3) -> tuple[list[list[int]], int]:
    """The tokens of each row, and how many steps they took."""
    on.cache.restart()
    made = Decoding(on, PROMPTS[: on.cache.batch], sampling, Limits(new))
    for _ in made.run():
        pass
    return [row.tokens for row in made.rows], made.counts.steps


def brought(on: Session) -> set[str]:
    """Outputs of steps that came to the host."""
    steps = [bound for (_, last, _), bound in on._bound.items() if not last]
    assert steps and all(isinstance(bound, TritonBound) for bound in steps)
    return {name for bound in steps for name in bound.outputs._here}  # type: ignore[attr-defined]


@interpreted
@pytest.mark.parametrize(
    ("recipe", "rows", "sampling", "read"),
    [
        ("none", 2, SETTINGS[1], set()),
        ("prompt-lookup", 1, SETTINGS[0], set()),
        ("token-recycling", 1, SETTINGS[1], {"logits"}),  # the drafter learns from them
    ],
    ids=["plain", "lookup", "recycling"],
)
def test_generates_the_tokens_of_the_reference(
    recipe: str, rows: int, sampling: Sampling, read: set[str], starts: list[float]
) -> None:
    targets: tuple[Target, Target] = ("torch", "triton")
    wanted, ours = (session(recipe, target, rows) for target in targets)
    found = generated(ours, sampling)
    assert found == generated(wanted, sampling)
    assert starts == [sampling.temperature] * found[1] and not ours.chains
    assert brought(ours) == read
    drafted = max(tokens for tokens, last, _ in ours._bound if not last) > 1
    assert drafted == (recipe != "none")


@interpreted
def test_replays_choose_by_what_each_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, drawn by several seeds and requests, and not at all: by one graph."""
    made: list[Recorded] = []
    monkeypatch.setattr(TritonBound, "_capture", lambda self: made.append(Recorded(self)) or made[-1])
    monkeypatch.setattr(TritonBound, "_captures", True)
    ours = session("none", "triton")
    ours.prefill(PROMPTS[:1])
    ways = [(0, 0.0, 0), None, (1, 1.0, 4), (2, 1.0, 4), (2, 1.0, 5), None, (0, 0.0, 0), (2, 0.5, 5)]
    for way in ways:
        position = torch.tensor([ours.cache.lengths])
        outputs = ours.step(torch.tensor([[7]]), position, draw=way and Draw(*way[:2], torch.tensor([way[2]])))
        if way is None:
            assert ours.chosen is None
        else:
            seed, temperature, request = way
            sampling, logits = Sampling(seed=seed, temperature=temperature), outputs["logits"].flatten(0, 1)
            assert ours.chosen is not None
            assert torch.equal(ours.chosen[0], choose(sampling.process(logits), sampling, request, position[0] + 1))
        ours.cache.commit([[0]])
    assert [graph.replays for graph in made] == [len(ways) - 1]  # the first step compiles


@interpreted
def test_an_output_is_brought_once_a_step_and_only_if_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = session("none", "triton")
    ours.prefill(PROMPTS[:1])
    requests, token, position = ASKED
    first = ours.step(token, position, draw=Draw(0, 0.0, requests))
    assert ours.chosen is not None and brought(ours) == set() and list(first) == ["logits"]
    logits = first["logits"]
    assert torch.equal(logits.argmax(-1), ours.chosen) and first["logits"] is logits
    before = logits.clone()
    second = ours.step(token + 1, position)
    assert ours.chosen is None and torch.equal(logits, before)
    assert second["logits"] is logits and not torch.equal(logits, before)
    monkeypatch.setattr(bound_triton.Results, "forget", lambda self: None)
    third = ours.step(token, position)
    assert not torch.equal(third["logits"], before), "what is not forgotten is not brought again"


@interpreted
def test_the_next_inputs_are_not_written_before_these_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else waits for the device where no output is read."""
    told: list[str] = []

    class Event:
        def record(self) -> None:
            told.append("recorded")

        def synchronize(self) -> None:
            told.append("waited")

    send, launch = Mirror.send, TritonBound._launch
    monkeypatch.setattr(bound_triton, "_event", lambda device: Event())
    monkeypatch.setattr(Mirror, "send", lambda self: (send(self), told.append("sent")))
    monkeypatch.setattr(TritonBound, "_launch", lambda self: (launch(self), told.append("launched")))
    ours = session("none", "triton")
    ours.prefill(PROMPTS[:1])
    told.clear()
    ours.step(*ASKED[1:])
    assert told == ["recorded", "sent", "launched", "waited"]


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["none", "prompt-lookup", "token-recycling"])
def test_generates_the_tokens_of_the_reference_on_a_gpu(recipe: str) -> None:
    targets: tuple[Target, Target] = ("torch", "triton")
    wanted, ours = (session(recipe, target) for target in targets)
    for sampling in (*SETTINGS, Sampling(temperature=0.7, seed=3)):
        assert generated(ours, sampling, new=24) == generated(wanted, sampling, new=24)
    assert brought(ours) == ({"logits"} if recipe == "token-recycling" else set())
