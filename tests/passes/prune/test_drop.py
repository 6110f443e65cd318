"""prune.drop: the blocks that turn the stream least leave with their weights and their cache sites."""

import pytest
import torch

from smelt.ir.blocks import blocks
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.cache.insert import Insert
from smelt.passes.measure import replay
from smelt.passes.prune.drop import Drop


def quiet(program, *names, by=1e-4):
    """The program with products that say next to nothing."""
    for name in names:
        weight = program.weights[f"model.layers.{name}.weight"]
        program.weights[f"model.layers.{name}.weight"] = Weight.of(weight.dense() * by)


def logits(program, rows):
    return interpret(program, {"tokens": rows, "positions": torch.arange(rows.shape[1]).expand(rows.shape)})["logits"]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_says_least_leaves(llama, tokens, layer):
    quiet(llama, f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj")
    whole, before = logits(llama, tokens()), llama.nbytes
    outcome = Drop(share=0.5).apply(llama, Samples(tokens(4)))
    verify(llama)
    assert outcome.done == (f"layer {layer}",) and list(outcome.skipped) == [f"layer {1 - layer}"]
    assert not [name for name in llama.weights if f"layers.{layer}." in name]
    assert outcome.notes["bytes"] == {"before": before, "after": llama.nbytes} and llama.nbytes < before
    assert (logits(llama, tokens()) - whole).abs().max() < 0.02 * whole.abs().max()


def test_blocks_leave_by_themselves(llama, tokens):
    quiet(llama, "0.mlp.down_proj", "1.self_attn.o_proj")
    outcome = Drop(share=0.5, unit="block").apply(llama, Samples(tokens(4)))
    assert outcome.done == ("layer 0, feedforward", "layer 1, attention")
    assert [str(block) for block in blocks(llama)] == ["layer 0, attention", "layer 0, feedforward"]
    whole = logits(llama, tokens())
    Insert("float32").apply(llama, None)
    assert [site.layer for site in llama.cache.sites] == [0]
    torch.testing.assert_close(replay(llama, tokens(), 20), whole[:, 20:], rtol=1e-5, atol=1e-4)


def test_a_given_list_needs_no_text(llama):
    drop = Drop(attention=(1,), feedforward=(0, 1))
    assert drop.calibration == "none" and not list(drop.requires(llama))
    assert len(drop.apply(llama, None).done) == 3 and [str(b) for b in blocks(llama)] == ["layer 0, attention"]


def test_what_cannot_leave_is_said(llama):
    assert list(Drop(attention=(0, 1)).requires(llama)) == ["one attention must stay at least"]
    assert list(Drop(feedforward=(2,)).requires(llama)) == [
        "layer 2 must be one of the layers with a part feedforward of its own, which are [0, 1]"
    ]
    with pytest.raises(SmeltError, match="leaves no attention: lower it"):
        Drop(share=0.9).apply(llama, Samples(torch.zeros(1, 8, dtype=torch.int64)))
    with pytest.raises(SmeltError, match="share is above 0 and below 1"):
        Drop(share=0.0)
    Insert("float32").apply(llama, None)
    assert "must come before the cache is inserted" in next(iter(Drop().requires(llama)))
