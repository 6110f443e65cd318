"""cache.score, transform, merge, tier, retrieve and predict: what they set, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Merge, Predict, Retrieve, Score, Tier
from smelt.ir.cache.code import Code
from smelt.ir.encoding import Affine, parse
from smelt.ir.errors import SmeltError
from smelt.passes.base import Samples
from smelt.passes.cache.encode import Encode
from smelt.passes.cache.insert import Insert
from smelt.passes.cache.merge import Merge as Merges
from smelt.passes.cache.predict import Predict as Predicts
from smelt.passes.cache.retrieve import Retrieve as Retrieves
from smelt.passes.cache.score import Score as Scores
from smelt.passes.cache.select import Select as Selects
from smelt.passes.cache.tier import Tier as Tiers
from smelt.passes.cache.transform import Transform
from smelt.passes.measure import replay

KEYS, VALUES = Affine(8, 32, axis="channel", zero=True), Affine(8, 32, zero=True)
LEARNED = parse({"nonuniform": {"bits": 2, "axis": "channel", "group": 16}})
SMALL = {"sink": 2, "tail": 32, "page": 32}
PROMPT = {"when": "prompt", "skip_layers": (), **SMALL}
BELOW = Tier(KEYS, VALUES)
EVERY = [Scores(), Transform(), Merges(), Tiers((BELOW,), 64), Retrieves(dense_layers=0, budget=64), Predicts()]


@pytest.mark.parametrize("step", EVERY, ids=lambda step: type(step).__name__)
def test_there_must_be_a_cache(llama, step):
    assert "llama must have a cache plan, but has none: put cache.insert in front" in list(step.requires(llama))


def refusal(step, program):
    """The first reason of a step that must not run."""
    return next(iter(step.requires(program)))


def run(step, program, samples=None):
    assert not list(step.requires(program))
    return step.apply(program, samples)


def test_a_score_is_noted_for_the_selection_behind_it(cached):
    outcome = run(Scores(queries=8, pool=3), cached)
    assert outcome.done == ("layer 0", "layer 1")
    assert {site.score for site in cached.cache.sites} == {Score("attention", 8, pool=3)}
    assert refusal(Scores(), cached) == "layer 0 already has a score by attention: keep one of the two steps"
    run(Selects(**PROMPT), cached)
    assert {site.select.score for site in cached.cache.sites} == {Score("attention", 8, pool=3)}
    assert "put cache.score in front of cache.select" in refusal(Scores(), cached)
    with pytest.raises(SmeltError, match="pool is an odd number of tokens, not 2"):
        Scores(pool=2)


def test_frames_are_chosen_once_and_before_keys_are_encoded(cached):
    encoded, learned = cached.fork(), cached.fork()
    run(Transform(compact=True), cached)
    assert {(site.frame, site.compact) for site in cached.cache.sites} == {("pre", True)}
    assert refusal(Transform(), cached) == "layer 0 already stores keys un-rotated: put both into one cache.transform"
    run(Encode(KEYS, **SMALL), encoded)
    assert "before keys of layer 0 are encoded: move cache.transform in front" in refusal(Transform(), encoded)
    learned.cache = learned.cache.with_site(replace(learned.cache[1], rope=None))
    assert "keys of layer 1 must be rotated by their positions, but are not" in refusal(Transform(), learned)
    with pytest.raises(SmeltError, match="compact moves keys to other positions, which needs frame: pre"):
        Transform("post", compact=True)


def test_the_frame_alone_changes_nothing(cached, tokens):
    ids, moved = tokens(1, 90), cached.fork()
    run(Selects("recency", keep=0.5, skip_layers=(), **SMALL), cached)
    run(Transform(), moved)
    run(Selects("recency", keep=0.5, skip_layers=(), **SMALL), moved)
    assert torch.allclose(replay(moved, ids, 80), replay(cached, ids, 80), atol=1e-3)


def test_merging_follows_a_selection_over_the_prompt(cached):
    assert "must select tokens of its prompts, but keeps all: put cache.select in front" in refusal(Merges(), cached)
    norms, pages, encoded = cached.fork(), cached.fork(), cached.fork()
    run(Selects("key_norm", **PROMPT), norms)
    assert "layer 0 selects by key_norm, which is no weight for a mean" in refusal(Merges(), norms)
    run(Selects("value_norm", skip_layers=()), pages)
    assert "set select with when: prompt" in refusal(Merges(), pages)
    run(Selects("value_norm", **PROMPT), encoded)
    assert "store them with frame: pre, or merge values_only" in refusal(Merges(), encoded)
    run(Encode(values=VALUES), encoded)
    assert "merging must come before layer 0 is encoded: move cache.merge in front" in refusal(Merges(), encoded)
    run(Selects("value_norm", **{**PROMPT, "skip_layers": (0,)}), cached)
    outcome = run(Merges(0.25, values_only=True), cached)
    assert outcome.done == ("layer 1",) and outcome.skipped == {"layer 0": "keeps every token"}
    assert [site.merge for site in cached.cache.sites] == [None, Merge(0.25, values_only=True)]
    assert refusal(Merges(), cached) == "layer 1 already merges: keep one of the two steps"
    with pytest.raises(SmeltError, match="share is a fraction"):
        Merges(0.0)


def test_tiers_stand_below_the_encoded_body(cached):
    tier = Tier(Affine(4, 32, axis="channel"), Affine(4, 32))
    assert "must leave the tail, but all stay: put cache.encode in front" in refusal(Tiers((tier,), 64), cached)
    run(Encode(KEYS, VALUES, **SMALL), cached)
    assert "tiers by age need `hold`" in refusal(Tiers((tier,)), cached)
    assert "put cache.select in front" in refusal(Tiers((replace(tier, share=0.5),)), cached)
    run(Tiers((tier,), 64), cached)
    assert {(site.hold, site.tiers) for site in cached.cache.sites} == {(64, (tier,))}
    assert refusal(Tiers((tier,), 64), cached) == "layer 0 already has tiers: put all into one cache.tier"
    for options, message in (({"share": 1.0}, "share is a fraction"), ({"share": 0.5, "budget": 64}, "leave one")):
        with pytest.raises(SmeltError, match=message):
            Tier(**options)
    with pytest.raises(SmeltError, match="give at least one tier"):
        Tiers()


def test_tiers_get_tables_of_their_own(cached, tokens):
    run(Encode(KEYS, VALUES, **SMALL), cached)
    step = Tiers((Tier(LEARNED, VALUES),), 64)
    assert step.calibration == "text" and Tiers((BELOW,), 64).calibration == "none"
    with pytest.raises(SmeltError, match="leave 18 tokens behind the sinks, fewer than a page of 32"):
        step.apply(cached.fork(), Samples(tokens(1, 20)))
    run(step, cached, Samples(tokens(2, 96)))
    assert {name.rsplit(".", 1)[0] for name in cached.cache.tables} == {"0.keys.1", "1.keys.1"}
    assert bool(replay(cached, tokens(1, 150), 140).isfinite().all())


def test_layers_behind_the_dense_ones_read_a_part(cached):
    outcome = run(Retrieves(dense_layers=1, budget=64), cached)
    assert outcome.done == ("layer 1",) and outcome.skipped == {"layer 0": "reads everything: dense_layers"}
    assert [site.retrieve for site in cached.cache.sites] == [None, Retrieve("pages", 64)]
    assert {(site.sink, site.tail, site.page) for site in cached.cache.sites} == {(4, 64, 16)}
    assert "layer 1 already reads a part of its cache" in refusal(Retrieves(dense_layers=1, budget=64), cached)


def test_a_list_is_reused_behind_the_layer_that_makes_it(cached):
    run(Encode(KEYS, VALUES, **SMALL), cached)
    seen = cached.cache.sites[1]
    cached.cache = cached.cache.with_site(replace(seen, window=40))
    step = Retrieves("reuse", 64, dense_layers=0, layers=(0,))
    assert "layer 1 sees a window of 40 tokens, and no layer in front of it that selects does" in refusal(step, cached)
    cached.cache = cached.cache.with_site(seen)
    run(step, cached)
    assert [site.retrieve for site in cached.cache.sites] == [Retrieve("dense", 64), Retrieve("reuse", 64, 0)]
    assert {(site.sink, site.tail, site.page) for site in cached.cache.sites} == {(2, 32, 32)}


@pytest.fixture(scope="module")
def paired():
    """Five layers on one input, as all of them write zeros: 0, 1 and 3 attend alike, and so do 2 and 4."""
    transformers = pytest.importorskip("transformers")
    from smelt.ir.capture.hf import capture_hf

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1,
        head_dim=64, vocab_size=97, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kinds = [[torch.randn_like(p) * 0.3 for p in model.model.layers[0].self_attn.parameters()] for _ in range(2)]
    for layer, kind in zip(model.model.layers, (0, 0, 1, 0, 1), strict=True):
        for parameter, data in zip(layer.self_attn.parameters(), kinds[kind], strict=True):
            parameter.data = data.clone()
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    program = capture_hf(model)
    Insert("float32").apply(program, None)
    return program


def test_the_layer_whose_list_serves_those_behind_it_is_found(paired, tokens):
    step = Retrieves("reuse", 16, dense_layers=0, layers=(0, "auto"), tail=16, page=16)
    texts, program = Samples(tokens(6, 128)), paired.fork()  # joined to texts of 256 tokens
    lost = run(step, program, texts).notes["attention lost if it selects"]
    # layer 1: 2 and 4 read another kind's list; layer 2: 3 does; layer 3: 2 and 4 do; layer 4: 2 does
    assert min(lost, key=lost.get) == "layer 2" and lost["layer 1"] == max(lost.values())
    by = [None if site.retrieve is None else (site.retrieve.by, site.retrieve.source) for site in program.cache.sites]
    assert by == [("dense", None), ("reuse", 0), ("dense", None), ("reuse", 2), ("reuse", 2)]
    assert step.calibration == "text" and Retrieves("reuse", 16, 0, (0, 2)).calibration == "none"
    with pytest.raises(SmeltError, match="compares lists on texts of 55 tokens, of which 52 are always read"):
        step.apply(paired.fork(), Samples(tokens(1, 55)))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Retrieves("reuse", 64, 0, (1, "auto")), "auto is a layer behind layer 1, and the cache has none"),
        (Retrieves(budget=64), "dense_layers 2 leaves no layer that reads less: the cache has 2 layers"),
        (Retrieves("reuse", 64, 0, (0, 7)), "layers names layer 7, but the cache has the layers 0 to 1"),
        (Retrieves(budget=8, dense_layers=0), "a budget of 8 tokens does not read one page of 16"),
        (Retrieves(budget=4096, dense_layers=0), "never exceeded in this model's context of 256"),
    ],
)
def test_what_reads_nothing_less_is_refused(cached, step, message):
    assert message in refusal(step, cached)


def test_what_reading_needs_says_so(cached):
    for options, message in (
        ({"budget": 0}, "reads nothing of the body"),
        ({"by": "reuse"}, "by: reuse and layers"),
        ({"by": "reuse", "layers": (1,)}, "layers must ascend from dense_layers"),
        ({"by": "reuse", "layers": ("auto",), "dense_layers": 0}, "layers may end in one auto, behind layers that"),
    ):
        with pytest.raises(SmeltError, match=message):
            Retrieves(**options)
    cached.cache = cached.cache.with_site(replace(cached.cache[0], code=Code()))
    assert "leave out cache.code" in refusal(Retrieves(budget=64, dense_layers=0), cached)


def test_a_forecast_is_fitted_to_what_is_stored(cached, tokens):
    bare = cached.fork()
    assert "keys and values of layer 0 must be encoded, but are dense" in refusal(Predicts(), cached)
    run(Encode(KEYS, VALUES, **SMALL), bare)
    assert "store them with frame: pre" in refusal(Predicts(), bare)
    run(Transform(), cached)
    run(Encode(LEARNED, VALUES, **SMALL), cached, Samples(tokens(4, 96)))
    before = dict(cached.cache.tables)
    outcome = run(Predicts(), cached, Samples(tokens(4, 96)))
    assert outcome.done == ("layer 0", "layer 1") and set(outcome.notes["bits saved by the forecast"]) == {"layer 1"}
    assert [site.predict for site in cached.cache.sites] == [Predict(True), Predict()]
    after = cached.cache.tables
    assert set(after) - set(before) == {"1.predict.keys", "1.predict.values"}
    assert after["1.predict.keys"].shape == (129, 128) and after["1.predict.values"].shape == (257, 128)
    same = {layer: all(torch.equal(after[n], t) for n, t in before.items() if n[0] == layer) for layer in "01"}
    assert same == {"0": True, "1": False}  # the tables of layer 1 are those of what its forecast misses
    assert "layer 0 already stores what a forecast misses" in refusal(Predicts(), cached)
    assert bool(replay(cached, tokens(1, 110), 100).isfinite().all())
    with pytest.raises(SmeltError, match="damp is a share"):
        Predicts(1.0)
