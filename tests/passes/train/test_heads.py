"""train.heads: training lowers held-out loss, is reproducible, leaves logits alone, and fits the draft tree."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.base import Checkpoints
from smelt.passes.decode._trees import best_tree
from smelt.passes.decode.heads import Heads
from smelt.passes.decode.recycle import Recycle
from smelt.passes.train._drill import Drill
from smelt.passes.train.heads import Heads as Train


@pytest.fixture
def headed(cached: Program) -> Program:
    Heads(heads=2, width=4, nodes=6).apply(cached, None)
    cached.touched.clear()
    return cached


QUICK = Train(steps=30, batch=4, length=32, rate=1e-2, own=0.0)
BOTH = torch.arange(2)


def test_it_learns_and_leaves_the_logits_alone(headed, text):
    before = headed.fork()
    outcome = QUICK.apply(headed, text)
    verify(headed)
    assert outcome.done == ("heads.0", "heads.1")
    first, last = outcome.notes["before"], outcome.notes["after"]
    assert last["loss"] < 0.6 * first["loss"]
    assert all(new > old for new, old in zip(last["top4"], first["top4"], strict=True))
    assert outcome.notes["kept_update"] > 0
    assert [point[0] for point in outcome.notes["curve"]] == [0, 3, 7, 11, 15, 18, 22, 26, 30]
    assert headed.facts["heads_trained"] is True
    trained = {f"heads.{j}.{part}.weight" for j in (0, 1) for part in ("block", "projection")}
    assert headed.touched == {"decode", *trained}
    assert {name for name in before.weights if headed.weights[name] is not before.weights[name]} == trained
    ids = text.tokens[:1, :12]
    inputs = {"tokens": ids, "positions": torch.arange(12)[None]}
    assert torch.equal(interpret(headed, inputs)["logits"], interpret(before, inputs)["logits"])


def test_the_tree_fits_what_was_measured(headed, text):
    QUICK.apply(headed, text)
    windows = text.tokens.reshape(-1, 32)
    held = windows[-math.ceil(len(windows) / 10) :][:32]
    score = Drill.of(headed, 0.8, 0.0, held, held).measure(4)
    assert headed.decode.draft.tree == best_tree(score.hits, 6)
    assert headed.decode.draft.width == 4


def test_hits_and_loss_are_what_they_say(headed, text):
    """Against a plain loop: head j at place t is right if its rank r is token t + j + 2."""
    torch.manual_seed(0)
    for name in [n for n in headed.weights if n.endswith("block.weight") and n.startswith("heads.")]:
        weight = headed.weights[name]
        weight.parts["data"].copy_(torch.randn(weight.shape) * 0.1)
    ids = text.tokens[:2, :16]
    heads = interpret(headed, {"tokens": ids, "positions": torch.arange(16).expand(2, -1)})["heads"]
    hits, loss, places = torch.zeros(2, 4), 0.0, 0
    for row in range(2):
        for t in range(16 - 3):
            places += 1
            for j in range(2):
                came = ids[row, t + j + 2]
                hits[j] += heads[row, t, j].topk(4).indices == came
                loss += 0.5**j * functional.cross_entropy(heads[row, t, j], came).item()
    score = Drill.of(headed, 0.5, 0.0, ids, ids).measure(4)
    torch.testing.assert_close(torch.tensor(score.hits), hits / places)
    assert score.loss == pytest.approx(loss / places, rel=1e-5)


def test_what_the_model_would_write_is_read_off_the_text(headed, text):
    """Against writing it: from a place where the text is the model's own choice, as far as it is."""
    ids = text.tokens[:2, :16].clone()

    def chosen(prefix: torch.Tensor) -> int:
        inputs = {"tokens": prefix[None], "positions": torch.arange(len(prefix))[None]}
        return int(interpret(headed, inputs)["logits"][0, -1].argmax())

    for at in (4, 5, 6, 12):  # the model is random: without these the text is hardly what it would choose
        ids[0, at] = chosen(ids[0, :at])
    _, (came, wanted) = (drill := Drill.of(headed, 0.8, 0.5, ids, ids)).guesses(drill.held, BOTH)
    known = 0
    for row in range(2):
        for t in range(13):
            written = ids[row, : t + 1]
            for j in range(2):
                assert came[row, t, j] == ids[row, t + j + 2]
                written = torch.cat([written, torch.tensor([chosen(written)])])
                follows = torch.equal(written, ids[row, : t + j + 2])
                assert wanted[row, t, j] == (chosen(written) if follows else -100)
                known += follows
    assert 4 + 2 <= known < 2 * 2 * 13


def test_gradients_are_those_of_the_plain_loss(headed, text):
    """The loss never holds logits; here they are."""
    torch.manual_seed(0)
    ids = text.tokens[:2, :16]
    drill = Drill.of(headed, 0.5, 0.25, ids, ids)
    for value in drill.weights.values():
        value.data += torch.randn_like(value) * 0.05
    plain = torch.zeros(())
    states, labels = drill.guesses(drill.learn, BOTH)
    for j, state in enumerate(states):
        logits = (state @ drill.weights[f"heads.{j}.projection.weight"].T).flatten(0, 1)
        came, chosen = (functional.cross_entropy(logits, label[..., j].flatten()) for label in labels)
        plain = plain + 0.5**j * (0.75 * came + 0.25 * chosen)
    want = torch.autograd.grad(plain, list(drill.weights.values()))
    got = torch.autograd.grad(drill.loss(BOTH, torch.Generator()), list(drill.weights.values()))
    assert all(float(w.abs().max()) > 1e-5 for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-7, rtol=1e-4)


def test_heads_must_end_in_a_projection(headed):
    (stacked,) = (node for node in headed.graph.nodes if node is headed.outputs["heads"])
    first = stacked.all_input_nodes[0]
    with headed.graph.inserting_after(first):
        relu = headed.graph.call_function(torch.ops.aten.relu.default, (first,))
    stacked.replace_input_with(first, relu)
    with pytest.raises(SmeltError, match=r"head 0 must end in smelt\.head to be trained, but ends in relu"):
        Drill.of(headed, 0.8, 0.0, torch.zeros(1, 8), torch.zeros(1, 8))


def test_a_text_may_show_nothing_of_what_the_model_would_write(headed):
    """Then nothing is learned."""
    text = torch.tensor([[3, 90, 51, 7] * 16] * 8)
    outcome = Train(steps=2, batch=2, length=32, own=1.0).apply(headed, Samples(text))
    assert outcome.notes["kept_update"] == 0 and outcome.notes["after"]["loss"] == 0


def test_the_seed_decides(headed, text):
    def after(seed: int) -> torch.Tensor:
        program = headed.fork()
        Train(steps=4, batch=2, length=32, rate=1e-2, seed=seed).apply(program, text)
        return program.weights["heads.1.projection.weight"].dense()

    assert torch.equal(after(0), after(0))
    assert not torch.equal(after(0), after(1))


def test_only_the_heads_own_weights_learn(cached, text):
    Heads(heads=1, width=4, nodes=4, projection="tied").apply(cached, None)
    before = dict(cached.weights)
    Train(steps=3, batch=2, length=32).apply(cached, text)
    assert {name for name in before if cached.weights[name] is not before[name]} == {"heads.0.block.weight"}


def test_a_shared_layer_learns_with_its_heads(cached, text):
    Heads(heads=2, width=1, nodes=2, projection="tied", shared=24).apply(cached, None)
    before = dict(cached.weights)
    outcome = Train(steps=8, batch=2, length=32, rate=1e-2, own=0.0).apply(cached, text)
    learned = {"heads.layer.weight", "heads.0.block.weight", "heads.1.block.weight"}
    assert {name for name in before if cached.weights[name] is not before[name]} == learned
    assert outcome.notes["after"]["loss"] < outcome.notes["before"]["loss"]
    assert cached.decode.draft.tree.parents == (0, 0, 1)


def test_weights_keep_their_type(cached, text):
    Heads(heads=1, width=4, nodes=4, dtype="bfloat16").apply(cached, None)
    Train(steps=2, batch=2, length=32).apply(cached, text)
    assert str(cached.weights["heads.0.block.weight"].encoding) == "dense(dtype=bfloat16)"


def test_a_training_that_only_hurts_is_forgotten(cached, text):
    Heads(heads=2, width=4, nodes=6, projection="tied").apply(cached, None)
    before = cached.weights["heads.0.block.weight"].dense()
    outcome = Train(steps=5, batch=2, length=32, rate=1e6).apply(cached, text)
    assert outcome.notes["kept_update"] == 0
    assert torch.equal(cached.weights["heads.0.block.weight"].dense(), before)


def test_own_projections_start_from_a_guess_of_the_states_to_come(headed, text):
    """Against ridge regression written out, and better than copies of the model's own head."""
    ids = text.tokens[:40, :32]
    drill = Drill.of(headed, 0.8, 0.0, ids, ids)
    copies, states = drill.measure(4), drill.learn.at(torch.arange(40))["hidden"]
    drill.fit()
    x, y = states[:, :30].reshape(-1, 64).double(), states[:, 2:].reshape(-1, 64).double()
    penalty = 0.01 * x.square().mean(0).mean() * len(x)
    rows = torch.cat([x, penalty.sqrt() * torch.eye(64)])
    ahead = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(64, 64)])).solution
    own = headed.weights["heads.1.projection.weight"].dense().double()
    torch.testing.assert_close(drill.weights["heads.1.projection.weight"].detach(), (own @ ahead.T).float())
    assert drill.measure(4).loss < copies.loss


def test_the_text_to_train_on_goes_before_the_calibration_text(headed, text):
    """And a checkpoint says which of them it learned."""
    one, other = headed.fork(), headed.fork()
    QUICK.apply(one, text)
    QUICK.apply(other, Samples(text.tokens.flip(0), training=text.tokens))
    name = "heads.0.block.weight"
    assert torch.equal(one.weights[name].dense(), other.weights[name].dense())


def test_a_training_is_taken_up_only_by_the_same(headed, text, tmp_path):
    quick = replace(QUICK, steps=4, checks=1)
    kept = Samples(text.tokens, checkpoints=Checkpoints(tmp_path))
    first, again = headed.fork(), headed.fork()
    assert quick.apply(first, kept).notes["resumed_at"] == 0
    assert quick.apply(again, kept).notes["resumed_at"] == 4
    name = "heads.1.projection.weight"
    assert torch.equal(first.weights[name].dense(), again.weights[name].dense())
    with pytest.raises(SmeltError, match=r"checkpoint of other heads: options\.seed is 0 there and 1 here"):
        replace(quick, seed=1).apply(headed.fork(), kept)
    with pytest.raises(SmeltError, match=r"checkpoint of other heads: another text"):
        quick.apply(headed.fork(), replace(kept, given=text.tokens.flip(0)))
    other = headed.fork()
    other.weights["heads.0.block.weight"] = Weight.of(torch.ones(other.weights["heads.0.block.weight"].shape))
    with pytest.raises(SmeltError, match=r"checkpoint of other heads: another model"):
        quick.apply(other, kept)


def test_what_the_frozen_model_says_is_kept_and_does_not_change(headed, text, monkeypatch):
    hidden = Drill.of(headed, 0.8, 0.0, text.tokens[:9, :16], text.tokens[:1]).learn
    once = hidden.at(torch.tensor([8, 2, 5]))["hidden"]
    whole = interpret(hidden.trunk, {"tokens": hidden.tokens, "positions": torch.arange(16).expand(9, -1)})["hidden"]
    torch.testing.assert_close(once, whole[[8, 2, 5]], atol=1e-5, rtol=1e-5)
    assert torch.equal(hidden.at(torch.tensor([5, 0]))["hidden"][0], once[2])
    monkeypatch.setattr("smelt.passes.train._frozen.ROOM", 0)
    forgetful = Drill.of(headed, 0.8, 0.0, text.tokens[:9, :16], text.tokens[:1]).learn
    assert torch.equal(forgetful.at(torch.tensor([8, 2, 5]))["hidden"], once)
    assert torch.equal(forgetful.at(torch.tensor([8, 2, 5]))["hidden"], once)


def test_progress_is_told(headed, text):
    told = []
    Train(steps=3, batch=2, length=32).apply(headed, Samples(text.tokens, lambda *what: told.append(what)))
    assert told == [(step, 3, "training heads") for step in (1, 2, 3)]


def test_there_must_be_heads(cached):
    assert list(Train().requires(cached)) == [
        "llama must decode by heads, but has no drafter: put decode.heads in front"
    ]
    Recycle().apply(cached, None)
    assert list(Train().requires(cached)) == [
        "llama must decode by heads, but decodes by recycle: put decode.heads in front"
    ]


def test_heads_are_trained_once(headed, text):
    Train(steps=1, batch=1, length=32).apply(headed, text)
    assert list(Train().requires(headed)) == ["the heads of llama must be untrained, but are trained: train them once"]


def test_encoded_heads_cannot_learn(headed):
    name = "heads.1.block.weight"
    headed.weights[name] = headed.weights[name].encoded(Affine(4, 32))
    assert list(Train().requires(headed)) == [
        "heads.1.block.weight must be Dense to be trained, but is "
        "affine(bits=4, group=32, axis=token, zero=False, scale=float16): move train.heads in front"
    ]


@pytest.mark.parametrize(
    "tokens, length, message",
    [
        (torch.zeros(9, 3, dtype=torch.int64), 8, "windows of 3 tokens are too short; give texts .* of 4 or more"),
        (torch.zeros(1, 8, dtype=torch.int64), 8, "1 windows of 8 tokens cannot be parted"),
    ],
)
def test_too_little_text_is_an_error(headed, tokens, length, message):
    with pytest.raises(SmeltError, match=message):
        Train(length=length).apply(headed, Samples(tokens))


BAD = [{"steps": 0}, {"batch": 0}, {"length": 0}, {"holdout": 0.0}, {"holdout": 1.0}, {"rate": 0.0}, {"checks": 0}]


@pytest.mark.parametrize("options", BAD)
def test_options_have_bounds(options):
    with pytest.raises(SmeltError, match=r"counts? from 1|a share of the text|above 0"):
        Train(**options)
