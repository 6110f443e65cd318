"""train.fuse: heads learn the model's law some tokens ahead, and the tree fits their hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from smelt.ir.encoding import Affine
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.passes import Samples
from smelt.passes.decode._trees import best_tree
from smelt.passes.decode.fuse import Fuse
from smelt.passes.train._fusion import Fusion
from smelt.passes.train.fuse import Fuse as Train


@pytest.fixture
def drafting(cached: Program) -> Program:
    Fuse(dtype="float32", heads=2, width=3, nodes=4).apply(cached, None)
    cached.touched.clear()
    return cached


def test_a_head_guesses_so_many_tokens_ahead(drafting: Program, tokens: Callable[..., torch.Tensor]) -> None:
    ids = tokens(2, 12)
    fusion = Fusion.of(drafting, 0.8, ids, ids)
    fusion.fit(drafting)
    assert drafting.draft is not None
    for name, value in fusion.weights.items():
        drafting.draft.weights[name].parts["data"].copy_(value.detach())
    hits = torch.zeros(2, 3)
    for row in ids:
        places = torch.arange(12)[None]
        said = interpret(drafting, {"tokens": row[None], "positions": places})
        before = torch.tensor([[[0 if t == 0 else int(row[t - 1]), int(row[t])] for t in range(11)]])
        inputs = {"tokens": row[None, 1:], "positions": places[:, :-1], "before": before}
        guesses = interpret(drafting.draft, {**inputs, "features": said["features"][:, :-1]})["logits"][0]
        choice = said["logits"][0].argmax(-1)
        for j in range(2):
            for t in range(11 - j):
                hits[j] += guesses[t, j].topk(3).indices == choice[t + 1 + j]
    found = torch.tensor(fusion.hits(3))
    torch.testing.assert_close(found, hits / torch.tensor([[22.0], [20.0]]))
    assert found[0, 0] > 0.1  # fitted, and before any update


def test_it_learns_and_touches_the_draft_alone(drafting: Program, text: Samples) -> None:
    before = drafting.fork()
    outcome = Train(steps=12, batch=4, length=32, rate=3e-3).apply(drafting, text)
    verify(drafting)
    assert drafting.draft is not None and drafting.decode is not None and before.draft is not None
    first, last = outcome.notes["curve"][0][2], min(point[2] for point in outcome.notes["curve"])
    assert last < first - 0.1
    assert drafting.touched == {"draft", "decode"}
    assert all(drafting.weights[name] is before.weights[name] for name in before.weights)
    changed = {name for name in before.draft.weights if drafting.draft.weights[name] is not before.draft.weights[name]}
    assert changed == set(before.draft.facts["own"])
    assert drafting.decode.draft.tree == best_tree(outcome.notes["hits"], 4)  # type: ignore[attr-defined]
    assert list(Train().requires(drafting)) == [
        "the draft model of llama must be untrained, but is trained: train it once"
    ]


def test_there_must_be_dense_heads_to_train(cached: Program) -> None:
    assert list(Train().requires(cached)) == ["llama must draft by a layer with heads: put decode.fuse in front"]
    Fuse(dtype="float32").apply(cached, None)
    assert cached.draft is not None
    held = cached.draft.weights["feature.heads.1"]
    encoding = Affine(bits=4, group=32)
    parts = encoding.encode(held.dense())
    cached.draft.weights["feature.heads.1"] = replace(held, encoding=encoding, parts=parts)
    (said,) = Train().requires(cached)
    assert said.startswith("feature.heads.1 must be Dense to be trained, but is ")
