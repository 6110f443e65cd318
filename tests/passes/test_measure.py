"""Measuring: the replay is the plain forward through a cache, and each number sees the fault it stands for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import fx

from smelt.ir.cache import CachePlan, Select
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import EMBEDDING, HEAD, LINEAR
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes import Samples
from smelt.passes.measure import Divergence, compare, compare_outputs, observe, perplexity, relative_error, replay, sqnr
from smelt.passes.probe import held_out, probe, reach

FP32 = 1e-5


def plain(program, tokens):
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    return interpret(program, {"tokens": tokens, "positions": positions})["logits"]


def compressed(program, bits, **options):
    """The program with pages of 8 tokens behind a tail of 8, keys and values at `bits`."""
    code = Affine(bits, 8, zero=True) if bits else None
    changes = {"sink": 2, "tail": 8, "page": 8, "keys": code, "values": code, **options}
    out = program.fork()
    out.cache = CachePlan(tuple(replace(site, **changes) for site in program.cache.sites))
    return out


@pytest.mark.parametrize(("prefix", "chunk"), [(0, 1), (1, 1), (7, 3), (24, 16), (39, 1), (20, 100)])
def test_replay_over_a_dense_cache_is_the_plain_forward(cached, tokens, prefix, chunk):
    given = tokens()
    logits = replay(cached, given, prefix, chunk)
    assert logits.shape == (2, 40 - prefix, 97)
    assert relative_error(plain(cached, given)[:, prefix:], logits) < FP32


def test_replay_without_a_plan_is_the_plain_forward(llama, tokens):
    assert torch.equal(replay(llama, tokens(), 9, 4), plain(llama, tokens())[:, 9:])


def test_replay_sees_a_compressed_cache_and_its_width(cached, tokens):
    exact = replay(cached, tokens(), 24)
    errors = [relative_error(exact, replay(compressed(cached, bits), tokens(), 24)) for bits in (8, 4, 2)]
    assert 1e-4 < errors[0] < errors[1] < errors[2]
    assert relative_error(exact, replay(compressed(cached, None), tokens(), 24)) < FP32  # paged, but dense


def test_replay_sees_dropped_tokens(cached, tokens):
    dropping = compressed(cached, None, select=Select("recency", 0.5))
    assert relative_error(replay(cached, tokens(), 24), replay(dropping, tokens(), 24)) > 1e-2


@pytest.mark.parametrize("chunk", [3, 5, 16])
def test_the_chunk_decides_the_time_and_not_the_result(cached, tokens, chunk):
    program = compressed(cached, None, select=Select("recency", 0.5))  # no codes, which rounding would flip
    assert relative_error(replay(program, tokens(), 20, 1), replay(program, tokens(), 20, chunk)) < FP32


def test_replay_sees_one_wrong_weight(cached, tokens):
    wrong = cached.fork()
    name = "model.layers.1.mlp.down_proj.weight"
    value = wrong.weights[name].dense().clone()
    value[3] = 0  # one dropped row
    wrong.weights[name] = Weight.of(value)
    assert relative_error(replay(cached, tokens(), 24), replay(wrong, tokens(), 24)) > 100 * FP32


@pytest.mark.parametrize(("prefix", "chunk"), [(40, 1), (-1, 1), (8, 0)])
def test_replay_refuses_spans_that_are_none(cached, tokens, prefix, chunk):
    with pytest.raises(ValueError):
        replay(cached, tokens(), prefix, chunk)


def test_divergence_of_a_known_pair():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward, backward = compare(p, q), compare(q, p)
    assert forward.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert backward.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)
    assert compare(p + 3.0, p).kl == pytest.approx(0, abs=1e-7)  # a shift is the same distribution …
    assert compare(p + 3.0, p).max_error > 1  # … and other logits


def test_divergence_is_the_mean_over_positions():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    both = compare(torch.stack([p, p]), torch.stack([p, q]))
    assert both.kl == pytest.approx(compare(p, q).kl / 2)


def test_divergence_of_mutants(tokens, llama):
    logits = plain(llama, tokens())
    assert compare(logits, logits.clone()) == Divergence(0.0, 1.0, 0.0)
    scaled = compare(logits, logits * 1.05)
    assert scaled.max_error == pytest.approx(0.05, rel=1e-3) and scaled.kl > 1e-4 and scaled.top1 == 1.0
    dropped = logits.clone()
    dropped[0, 7] = 0
    hurt = compare(logits, dropped)
    assert hurt.top1 == pytest.approx(79 / 80) and hurt.kl > 1e-3


def test_outputs_that_are_not_finite_are_infinitely_far():
    logits = torch.randn(3, 5)
    broken = logits.clone()
    broken[1, 1] = float("nan")
    found = compare(logits, broken)
    assert not found.finite and found.kl == math.inf and found.top1 == 0.0
    assert found.to_dict() == {"kl": None, "top1": 0.0, "max_error": None}


def test_outputs_that_are_no_logits_have_an_error_alone():
    a = {"hidden": torch.ones(2, 3), "pooled": torch.ones(2)}
    found = compare_outputs(a, {"hidden": torch.ones(2, 3), "pooled": torch.tensor([1.0, 1.25]), "more": torch.ones(1)})
    assert found.max_error == 0.25 and math.isnan(found.kl) and math.isnan(found.top1)
    with pytest.raises(SmeltError, match=r"the outputs \['pooled'\] are gone"):
        compare_outputs(a, {"hidden": torch.ones(2, 3)})
    with pytest.raises(SmeltError, match=r"output 'pooled': the shape was \[2\] and now is \[3\]"):
        compare_outputs(a, a | {"pooled": torch.ones(3)})


def test_sqnr_in_decibels():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert sqnr(x, x) == math.inf
    assert sqnr(x, x * 1.05) == pytest.approx(-20 * math.log10(0.05), abs=1e-3)
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_perplexity_of_known_guesses():
    assert perplexity(torch.zeros(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64)) == pytest.approx(11)
    sure = torch.full((1, 4, 11), -50.0)
    sure[..., 2] = 50
    assert perplexity(sure, torch.full((1, 4), 2)) == pytest.approx(1)
    assert perplexity(sure, torch.full((1, 4), 3)) > 1e40
    with pytest.raises(ValueError):
        perplexity(torch.zeros(2, 3, 11), torch.zeros(2, 4, dtype=torch.int64))


def test_a_probe_is_the_same_every_time_and_fits_the_context(llama):
    first, second = probe(llama), probe(llama)
    assert torch.equal(first.inputs["tokens"], second.inputs["tokens"])
    assert first.inputs["tokens"].shape == (2, 128) and first.prefix == 96
    llama.facts["context"] = 20
    assert probe(llama).inputs["tokens"].shape == (2, 20) and probe(llama).prefix == 15


def test_a_probe_is_longer_for_a_cache_that_compresses_late(cached):
    late = compressed(cached, 4, tail=100, page=32)
    assert reach(late.cache) == 134 and reach(cached.cache) == 0 and reach(None) == 0
    assert probe(late, reach=134).prefix == 134
    assert probe(late, reach=100_000).prefix == 256 - 32


def test_a_probe_of_a_large_model_is_small(llama):
    llama.weights["large"] = Weight.of(torch.empty(20_000, 20_000, device="meta"))
    asked = probe(llama)
    assert asked.inputs["tokens"].shape == (1, 112) and asked.chunk == 16


def test_a_probe_takes_tokens_that_passes_do_not_see(llama, tokens):
    samples = Samples(tokens(16, 70))
    seen, unseen = held_out(samples)
    assert torch.equal(torch.cat([seen.tokens, unseen.tokens]), samples.tokens) and len(unseen) == 2
    asked = probe(llama, unseen.inputs).inputs["tokens"]
    assert asked.shape == (2, 128) and torch.equal(asked[1, -70:], unseen.tokens[1])  # repeated: the end is the end
    single = Samples(tokens(1, 300))
    assert held_out(single) == (single, single)


def module(**facts):
    """x [B, 6] and ids [B, T] → y = x Wᵀ, e = the embeddings of ids."""
    graph = fx.Graph()
    x, ids = graph.placeholder("x"), graph.placeholder("ids")
    w, table = graph.create_node("get_attr", "w"), graph.create_node("get_attr", "table")
    y = graph.call_function(LINEAR.target, (x, w))
    graph.output({"y": y, "e": graph.call_function(EMBEDDING.target, (ids, table))})
    inputs = {"x": {"shape": ["B", 6], "dtype": "float32"}, "ids": {"shape": ["B", "T"], "dtype": "int64"}}
    weights = {"w": Weight.of(torch.randn(4, 6)), "table": Weight.of(torch.randn(3, 5))}
    return Program("plain", graph, weights, {"kind": "module", "inputs": inputs, **facts})


def test_a_module_is_probed_with_random_inputs_within_its_tables():
    asked = probe(module())
    assert asked.inputs["x"].shape == (2, 6) and asked.inputs["ids"].max() < 3
    found = observe(module(), asked)
    assert found["y"].shape == (2, 4) and found["e"].shape == (2, 16, 5)


def test_a_module_that_describes_no_inputs_is_refused():
    program = module()
    del program.facts["inputs"]
    program.facts["vocabulary"] = 3
    with pytest.raises(SmeltError, match=r"facts\['inputs'\] must describe the inputs \['ids', 'x'\]"):
        probe(program)


def test_an_encoder_is_not_compared_at_its_padding():
    graph = fx.Graph()
    tokens, mask = graph.placeholder("tokens"), graph.placeholder("mask")
    hidden = graph.call_function(EMBEDDING.target, (tokens, graph.create_node("get_attr", "table")))
    scores = graph.call_function(HEAD.target, (hidden, graph.create_node("get_attr", "w")))
    seen = graph.call_function(torch.ops.aten.sum.default, (mask,))
    graph.output({"hidden": scores, "seen": seen})
    weights = {"table": Weight.of(torch.randn(9, 4)), "w": Weight.of(torch.randn(7, 4))}
    program = Program("encoder", graph, weights, {"kind": "encoder", "vocabulary": 9, "context": 12})
    found = observe(program, probe(program))
    assert found["hidden"].shape == (12 + 6, 7) and int(found["seen"]) == 12 + 6
