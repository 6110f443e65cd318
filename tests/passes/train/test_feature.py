"""train.feature: drafts are unrolled as they will be made, the layer learns, and the tree fits its hits."""

from __future__ import annotations

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.passes import Samples
from smelt.passes.decode._trees import best_tree
from smelt.passes.decode.draft import Draft
from smelt.passes.decode.feature import Feature
from smelt.passes.train._unroll import Unroll
from smelt.passes.train.feature import Feature as Train


@pytest.fixture(params=[1, 2])
def drafting(cached: Program, request: pytest.FixtureRequest) -> Program:
    """A draft whose passes give one state, or two."""
    Feature(dtype="float32", ahead=request.param).apply(cached, None)
    Draft(rates=(0.5, 0.2), nodes=4, depth=2).apply(cached, None)
    cached.touched.clear()
    return cached


def unrolled(program: Program, tokens: torch.Tensor, rounds: int) -> Unroll:
    return Unroll.of(program, tokens, tokens, rounds, 0.5, 0.1)


def test_a_round_is_a_draft_of_so_many_tokens(drafting: Program, text: Samples) -> None:
    assert drafting.draft is not None
    for name, weight in drafting.draft.weights.items():
        if name == "feature.ahead.1.bent":  # which starts at zero
            weight.parts["data"].normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    ids = text.tokens[:1, :10]
    made = unrolled(drafting, ids, 4)
    features = made.held.at(torch.tensor([0]))["features"]
    rounds = made._rounds(made.held, torch.tensor([0]), 4)
    for known in (1, 4, 6):  # features of the model in front of the draft
        given = features[:, :known]
        while (n := given.shape[1] - known) < 4:
            ahead = ids[:, 1 : known + n + 1]
            inputs = {"tokens": ahead, "positions": torch.arange(known + n)[None], "features": given}
            out = interpret(made.part, inputs)["features"][:, -1].view(1, -1, 64)
            for j in range(out.shape[1]):
                place = rounds[n + j][1][:, known - 1]
                torch.testing.assert_close(place, out[:, j], atol=2e-5, rtol=1e-4)
            given = torch.cat([given, out], 1)


def test_it_learns_and_touches_the_draft_alone(drafting: Program, text: Samples) -> None:
    before = drafting.fork()
    outcome = Train(steps=20, batch=4, length=32, rate=3e-3, rounds=2, smooth=0.0).apply(drafting, text)
    verify(drafting)
    assert drafting.draft is not None and drafting.decode is not None and before.draft is not None
    first, last = outcome.notes["curve"][0][2], min(point[2] for point in outcome.notes["curve"])
    assert last < first - 0.15
    assert drafting.touched == {"draft", "decode"}
    assert all(drafting.weights[name] is before.weights[name] for name in before.weights)
    changed = {name for name in before.draft.weights if drafting.draft.weights[name] is not before.draft.weights[name]}
    assert changed == set(before.draft.facts["own"])
    hits = outcome.notes["hits"]
    assert drafting.decode.draft.tree == best_tree(hits, 4)  # type: ignore[attr-defined]
    assert list(Train().requires(drafting)) == [
        "the draft model of llama must be untrained, but is trained: train it once"
    ]


def test_there_must_be_a_layer_to_train(cached: Program) -> None:
    assert list(Train().requires(cached)) == [
        "llama must have a draft model over its features: put decode.feature in front"
    ]


def test_all_states_of_a_pass_must_be_unrolled(cached: Program) -> None:
    Feature(ahead=4).apply(cached, None)
    assert list(Train(rounds=4).requires(cached)) == []
    assert list(Train(rounds=3).requires(cached)) == [
        "rounds must be 4 or more, the states that a pass of the draft gives, but is 3"
    ]
    with pytest.raises(SmeltError, match="ahead counts the states of a pass from 1, not 0"):
        Feature(ahead=0)
