"""decode.heads: logits stay bit-equal, untrained heads repeat them, and heads compute what the paper's formula says."""

import pytest
import torch
from torch.nn import functional

from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import HEAD, arguments
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.ir.weight import Weight
from smelt.passes import Exactness
from smelt.passes.decode.heads import Heads
from smelt.passes.decode.recycle import Recycle
from smelt.passes.structure import same_computation


def run(program: Program, tokens: torch.Tensor, watch=None) -> dict[str, torch.Tensor]:
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return interpret(program, {"tokens": tokens, "positions": positions}, watch=watch)


def randomise(program: Program, scale: float = 0.2) -> None:
    torch.manual_seed(1)
    for name, weight in program.weights.items():
        if name.startswith("heads."):
            program.weights[name] = Weight.of(torch.randn(weight.shape) * scale)


@pytest.mark.parametrize("projection", ["own", "tied"])
def test_logits_stay_bit_equal(cached, tokens, projection):
    before, ids = cached.fork(), tokens(2, 9)
    Heads(heads=3, nodes=5, projection=projection).apply(cached, None)
    verify(cached)
    randomise(cached)
    assert same_computation(before, cached)
    assert torch.equal(run(cached, ids)["logits"], run(before, ids)["logits"])


@pytest.mark.parametrize("projection", ["own", "tied"])
def test_untrained_heads_repeat_the_next_token(cached, tokens, projection):
    Heads(heads=3, projection=projection, dtype="float32").apply(cached, None)
    out = run(cached, tokens(2, 9))
    assert out["heads"].shape == (2, 9, 3, 97)
    assert torch.equal(out["heads"], out["logits"][:, :, None].expand(-1, -1, 3, -1))
    assert cached.facts["heads_trained"] is False


@pytest.mark.parametrize("projection", ["own", "tied"])
def test_a_head_is_a_residual_block_and_a_projection(cached, tokens, projection):
    Heads(heads=2, projection=projection).apply(cached, None)
    randomise(cached)
    seen = []

    def watch(node, args, value):
        if node.target is HEAD.target and not seen:
            seen.append((args[0], str(arguments(node)["weight"].target)))

    out = run(cached, tokens(1, 7), watch)["heads"]
    ((hidden, own),) = seen
    for j in range(2):
        block = cached.weights[f"heads.{j}.block.weight"].dense()
        weight = cached.weights[f"heads.{j}.projection.weight" if projection == "own" else own].dense()
        expected = (hidden + functional.silu(hidden @ block.T)) @ weight.T
        torch.testing.assert_close(out[:, :, j], expected)
        without = (hidden + hidden @ block.T) @ weight.T
        assert (out[:, :, j] - without).abs().max() > 0.1


def test_heads_may_share_a_layer_and_draft_a_chain(cached, tokens):
    """Blockwise Parallel Decoding: x + W relu(U x), through the model's own head."""
    ids = tokens(1, 7)
    Heads(heads=2, width=1, nodes=2, projection="tied", shared=24, dtype="float32").apply(cached, None)
    assert cached.decode.draft.tree.parents == (0, 0, 1)
    layer = cached.weights["heads.layer.weight"].dense()
    assert layer.shape == (24, 64) and layer.abs().max() > 0
    out = run(cached, ids)
    assert torch.equal(out["heads"], out["logits"][:, :, None].expand(-1, -1, 2, -1))
    randomise(cached)
    seen = []
    out = run(cached, ids, lambda node, args, value: seen.append(args) if node.target is HEAD.target else None)["heads"]
    (hidden, weight), layer = seen[0][:2], cached.weights["heads.layer.weight"].dense()
    for j in range(2):
        block = cached.weights[f"heads.{j}.block.weight"].dense()
        torch.testing.assert_close(out[:, :, j], (hidden + (hidden @ layer.T).relu() @ block.T) @ weight.T)
        assert (out[:, :, j] - (hidden + hidden @ layer.T @ block.T) @ weight.T).abs().max() > 0.1


def test_weights_are_the_papers_and_of_the_asked_type(cached):
    before = set(cached.weights)
    outcome = Heads(heads=2, dtype="bfloat16").apply(cached, None)
    added = {name: tuple(cached.weights[name].shape) for name in sorted(set(cached.weights) - before)}
    assert added == {
        "heads.0.block.weight": (64, 64),
        "heads.0.projection.weight": (97, 64),
        "heads.1.block.weight": (64, 64),
        "heads.1.projection.weight": (97, 64),
    }
    count = 2 * (64 * 64 + 97 * 64)
    assert outcome.done == ("heads.0", "heads.1") and outcome.notes == {"parameters": count, "bytes": 2 * count}
    assert cached.touched >= {"decode", *added}


def test_tied_heads_add_blocks_only(cached):
    before = set(cached.weights)
    Heads(heads=2, projection="tied").apply(cached, None)
    assert set(cached.weights) - before == {"heads.0.block.weight", "heads.1.block.weight"}


def test_an_encoded_head_is_copied_decoded(cached, tokens):
    (head,) = cached.calls(HEAD)
    name = str(arguments(head)["weight"].target)
    cached.weights[name] = cached.weights[name].encoded(Affine(4, 32))
    Heads(heads=1, dtype="float32").apply(cached, None)
    assert torch.equal(cached.weights["heads.0.projection.weight"].dense(), cached.weights[name].dense())


def test_the_tree_is_as_deep_as_there_are_heads(cached):
    Heads(heads=2, width=4, nodes=12).apply(cached, None)
    plan, draft = cached.decode, cached.decode.draft
    assert (plan.drafter, draft.width, len(draft.tree), max(draft.tree.depths)) == ("heads", 4, 13, 2)
    assert Heads.exactness is Exactness.EXACT and Heads.effects == {"outputs", "decode"}


def test_there_must_be_a_cache(llama):
    assert list(Heads().requires(llama)) == ["llama must have a cache plan, but has none: put cache.insert in front"]


def test_one_drafter_of_a_kind_is_enough(cached):
    Heads().apply(cached, None)
    message = "llama must not draft by heads twice: keep one of the two steps"
    assert list(Heads().requires(cached)) == [message] and list(Recycle().requires(cached)) == []


def test_there_must_be_one_vocabulary_head(cached):
    (head,) = cached.calls(HEAD)
    with cached.graph.inserting_after(head):
        second = cached.graph.create_node("call_function", head.target, head.args, name="second")
    cached.set_output("again", second)
    assert list(Heads().requires(cached)) == [f"llama must have one vocabulary head, but has 2: {head.name}, second"]


def test_the_name_is_taken(cached):
    cached.set_output("heads", cached.outputs["logits"])
    assert list(Heads().requires(cached)) == ["llama must not use the name 'heads', which stands for decoding heads"]


@pytest.mark.parametrize("options", [{"heads": 0}, {"width": 0}, {"nodes": 0}])
def test_nothing_to_guess_is_an_error(options):
    with pytest.raises(SmeltError, match="heads, width and nodes count from 1"):
        Heads(**options)


def test_candidates_come_from_the_vocabulary(cached):
    assert list(Heads(width=98).requires(cached)) == ["width must be at most the vocabulary of 97 tokens, but is 98"]
