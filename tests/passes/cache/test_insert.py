"""cache.insert: the decode step it derives gives the plain forward's logits, and its plan has the model's geometry."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Rope, Site
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, CACHED_ATTENTION, arguments
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.passes import Exactness
from smelt.passes.cache.insert import Insert
from smelt.passes.measure import relative_error, replay

TOLERANCE = 1e-5  # float32, the order of sums differs


@pytest.fixture(scope="module")
def gemma() -> Program:
    """Sliding and full layers, softcap, grouped heads."""
    transformers = pytest.importorskip("transformers")
    from smelt.ir.capture.hf import capture_hf

    config = transformers.Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=97, max_position_embeddings=128, sliding_window=8, attn_logit_softcapping=2.0,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    return capture_hf(model)


def plain(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return interpret(program, {"tokens": tokens, "positions": positions})["logits"]


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_the_decode_path_gives_the_plain_logits(family, chunk, request, tokens):
    program, ids = request.getfixturevalue(family).fork(), tokens(2, 30)
    before = plain(program, ids)
    Insert("float32").apply(program, None)
    verify(program)
    assert relative_error(before[:, 11:], replay(program, ids, 11, chunk)) < TOLERANCE
    assert torch.equal(plain(program, ids), before)  # without a cache the op is plain causal attention


@pytest.mark.parametrize("argument, wrong", [("scale", 0.0625 * 1.05), ("window", 7), ("softcap", None), ("layer", 1)])
def test_a_wrong_site_is_noticed(gemma, tokens, argument, wrong):
    program, ids = gemma.fork(), tokens(2, 30)
    before = plain(program, ids)
    Insert("float32").apply(program, None)
    first = next(program.calls(CACHED_ATTENTION))
    place = CACHED_ATTENTION.arguments.index(argument)
    assert first.args[place] != wrong
    first.args = (*first.args[:place], wrong, *first.args[place + 1 :])
    assert relative_error(before[:, 11:], replay(program, ids, 11)) > 10 * TOLERANCE


def test_the_plan_has_the_models_geometry(gemma, llama):
    program = gemma.fork()
    outcome = Insert().apply(program, None)
    assert outcome.done == ("layer 0", "layer 1") and not outcome.skipped
    rope = Rope(tuple(10000 ** (-i / 8) for i in range(8)))
    for site, window in zip(program.cache.sites, (8, None), strict=True):
        plain = replace(site, rope=None, scale=None, softcap=None)
        assert plain == Site(site.layer, 4, 2, 16, 16, window=window, dense="float16")
        assert site.rope.inverse == pytest.approx(rope.inverse, rel=1e-6)
        assert (site.attention_scale, site.softcap) == (256**-0.5, 2.0)  # the model's own scale, not that of its heads
    assert [arguments(n)["layer"] for n in program.calls(CACHED_ATTENTION)] == [0, 1]
    assert not list(program.calls(ATTENTION))
    assert program.touched == {"cache"}
    Insert("bfloat16").apply(llama, None)
    assert replace(llama.cache[1], rope=None) == Site(1, 4, 2, 64, 64, dense="bfloat16", scale=64**-0.5)


@pytest.mark.parametrize("dtype, least, most", [("float16", 1e-6, 2e-3), ("bfloat16", 1e-5, 2e-2)])
def test_sixteen_bits_round_and_no_more(llama, tokens, dtype, least, most):
    ids = tokens(2, 40)
    before = plain(llama, ids)
    outcome = Insert(dtype).apply(llama, None)
    assert least < relative_error(before[:, 20:], replay(llama, ids, 20)) < most
    assert dtype in ("float16", "bfloat16") and "of their size" in outcome.notes["bound"]


def test_exactness_follows_the_type():
    assert Insert("float32").exactness is Exactness.EXACT
    assert Insert("float16").exactness is Insert("bfloat16").exactness is Exactness.BOUNDED


def change(program: Program, sites: list[int], **values: object) -> list[str]:
    """Give attention sites other arguments; returns their names."""
    names = []
    for number, node in enumerate(program.calls(ATTENTION)):
        if number in sites:
            bound = {**arguments(node), **values}
            node.args, node.kwargs = tuple(bound[name] for name in ATTENTION.arguments), {}
            names.append(node.name)
    return names


def test_attention_that_sees_the_future_is_left_alone(llama):
    first, second = change(llama, [0, 1], causal=False)
    assert list(Insert().requires(llama)) == []
    outcome = Insert().apply(llama, None)
    why = "is not causal: its tokens see what comes after them"
    assert outcome.done == () and outcome.skipped == {first: why, second: why}
    assert llama.cache is None and llama.touched == set()


def test_masked_attention_is_left_alone(llama):
    mask = next(n for n in llama.graph.nodes if n.op == "placeholder" and n.target == "positions")
    change(llama, [0, 1], mask=mask)
    why = "takes the mask 'positions', and a cache site sees every token before its own"
    assert set(Insert().apply(llama, None).skipped.values()) == {why}


def test_half_a_step_is_refused(llama):
    (name,) = change(llama, [1], causal=False)
    assert list(Insert().requires(llama)) == [
        f"every attention of llama must fit a cache site, but {name} is not causal: its tokens see what comes after "
        "them: a step needs all of them or none"
    ]


def test_a_cache_is_inserted_once(cached):
    assert list(Insert().requires(cached)) == ["llama must have no cache plan, but has one"]


def test_only_decoders_have_a_cache(llama):
    llama.facts["kind"] = "encoder"
    assert list(Insert().requires(llama)) == ["llama must be a decoder, but is a encoder"]


def test_an_unknown_type_is_an_error(llama):
    with pytest.raises(SmeltError, match="dense 'int8' is not float32, float16 or bfloat16"):
        Insert("int8").apply(llama, None)
