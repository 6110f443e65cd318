"""Equality told from graphs: what is the same needs no replay, and nothing else passes for it."""

from dataclasses import replace

import pytest

from smelt.ir.cache import CachePlan
from smelt.ir.ops import LINEAR, RMS_NORM
from smelt.ir.weight import Weight
from smelt.passes.structure import same_computation, same_graph

NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_fork_computes_the_same(cached):
    assert same_computation(cached, cached.fork()) and same_graph(cached, cached.fork())


def test_names_and_further_outputs_do_not_count(llama):
    after = llama.fork()
    hidden = after.outputs["logits"].args[0]
    after.set_output("hidden", hidden)
    for node in after.graph.nodes:
        if node.op == "get_attr" and node.target == NAME:
            node.target = "other"
    after.weights["other"] = after.weights.pop(NAME)
    assert same_computation(llama, after)
    assert not same_graph(llama, after)
    assert not same_computation(after, without(after, "logits"))


def without(program, output):
    out = program.fork()
    out.graph.output_node().args = ({name: node for name, node in out.outputs.items() if name != output},)
    return out


def test_a_new_weight_is_another_computation_on_the_same_graph(llama):
    after = llama.fork()
    after.weights[NAME] = Weight.of(llama.weights[NAME].dense())
    assert not same_computation(llama, after)
    assert same_graph(llama, after)


def test_another_cache_plan_is_another_computation(cached):
    after = cached.fork()
    after.cache = CachePlan(tuple(replace(site, dense="bfloat16") for site in cached.cache.sites))
    assert not same_computation(cached, after)


@pytest.mark.parametrize("mutant", ["weight", "number", "type", "skip"])
def test_a_changed_call_is_another_computation(llama, mutant):
    after = llama.fork()
    norm = next(after.calls(RMS_NORM))
    first, second = list(after.calls(LINEAR))[:2]
    if mutant == "weight":
        second.args = (second.args[0], first.args[1])
    elif mutant == "number":
        norm.args = (*norm.args[:2], 1e-5, *norm.args[3:])
    elif mutant == "type":
        norm.args = (*norm.args[:3], False)  # equal to 0.0, which stands there
    else:
        norm.replace_all_uses_with(norm.args[0])
    assert not same_computation(llama, after) and not same_graph(llama, after)
