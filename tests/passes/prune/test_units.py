"""What may be taken out of a graph is found from the graph alone, and everything else is left with a reason."""

from __future__ import annotations

import operator

import pytest
import torch

from smelt.ir.ops import ATTENTION, EMBEDDING, GATED, LAYER_NORM, LINEAR, RMS_NORM, arguments
from smelt.ir.program import Program
from smelt.passes.prune._shrink import resize
from smelt.passes.prune._units import find_units

from ..families import Sketch, captured

aten = torch.ops.aten
GROUPS = {"llama": (2, 32), "qwen2": (2, 32), "qwen3": (2, 32), "gemma2": (2, 32), "phi3": (2, 32), "cohere": (2, 32)}
HEADS = {"gpt_neox": (4, 16), "bert": (4, 16), "gpt2": (4, 16), "opt": (4, 16)}


def mlp(sketch: Sketch, middle: str = "relu") -> tuple[torch.fx.Node, torch.fx.Node]:
    """The hidden and the output value of table → up [32, 16] → activation → down [16, 32]."""
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    up = sketch.call(LINEAR, x, sketch.weight("up", 32, 16), sketch.weight("up.bias", 32))
    hidden = sketch.call(getattr(aten, middle).default, up)
    return hidden, sketch.call(LINEAR, hidden, sketch.weight("down", 16, 32), None)


def reasons(program: Program) -> dict[str, str]:
    return {name: refusal.reason for name, refusal in find_units(program)[1].items()}


def attend(sketch: Sketch, kv_heads: int = 2, mask: bool = False, sinks: bool = False) -> Program:
    """Four query heads of 4 over some key-value heads."""
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    sizes = [sketch.call(aten.sym_size.int, sketch.tokens, d) for d in (0, 1)]
    parts = []
    for name, heads in (("q", 4), ("k", kv_heads), ("v", kv_heads)):
        part = sketch.call(LINEAR, x, sketch.weight(name, heads * 4, 16), None)
        part = sketch.call(aten.view.default, part, [*sizes, heads, 4])
        parts.append(sketch.call(aten.transpose.int, part, 1, 2))
    bias = sketch.weight("bias", 1, 4, 1, 1) if mask else None
    sink = sketch.weight("sinks", 4) if sinks else None
    y = sketch.call(ATTENTION, *parts, bias, sink, 0.5, True)
    y = sketch.call(aten.reshape.default, sketch.call(aten.transpose.int, y, 1, 2), [*sizes, 16])
    return sketch.program(y=sketch.call(LINEAR, y, sketch.weight("o", 16, 16), None))


@pytest.mark.parametrize("family", [*GROUPS, *HEADS])
def test_families_have_an_mlp_and_an_attention_a_layer(family):
    sites, refused = find_units(captured(family))
    assert [(site.kind, tuple(site.columns.shape)) for site in sites] == 2 * [
        ("heads", (GROUPS | HEADS)[family]),
        ("neurons", (128, 1)),
    ]
    assert not refused


@pytest.mark.parametrize("family", [*GROUPS, *HEADS])
def test_columns_are_each_channel_once(family):
    for site in find_units(captured(family))[0]:
        assert torch.equal(site.columns.flatten().sort().values, torch.arange(site.columns.numel()))


def test_a_unit_of_grouped_attention_is_a_group():
    site = find_units(captured("llama"))[0][0]
    rows = {str(arguments(node)["weight"].target)[-13:-7]: site.units_of(numbers) for node, numbers in site.producers}
    assert torch.equal(rows["q_proj"], torch.arange(2).repeat_interleave(32))
    assert torch.equal(rows["k_proj"], torch.arange(2).repeat_interleave(16))
    assert torch.equal(rows["v_proj"], torch.arange(2).repeat_interleave(16))


def test_rows_of_fused_and_interleaved_products():
    (site,) = [s for s in find_units(captured("gpt_neox"))[0] if s.name == "gpt_neox.layers.0.attention.dense"]
    assert torch.equal(site.units_of(site.producers[0][1]), torch.arange(4).repeat_interleave(48))
    (site,) = [s for s in find_units(captured("gpt2"))[0] if s.name == "transformer.h.0.attn.c_proj"]
    assert torch.equal(site.units_of(site.producers[0][1]), torch.arange(4).repeat_interleave(16).repeat(3))


def test_experts_and_norms_across_heads_are_refused():
    inside = "its neurons are inside routed experts"
    assert reasons(captured("mixtral")) == {f"model.layers.{i}.mlp.experts.down_proj": inside for i in (0, 1)}
    program = captured("olmo2")
    found = find_units(program)[1]
    first, fifth = [node.name for node in program.calls(RMS_NORM)][0:8:4]  # the norms of the queries
    assert {name: (r.kind, r.reason) for name, r in found.items()} == {
        "model.layers.0.self_attn.o_proj": ("heads", f"{first} looks across all of them"),
        "model.layers.1.self_attn.o_proj": ("heads", f"{fifth} looks across all of them"),
    }


def test_a_plain_mlp():
    sketch = Sketch()
    _, out = mlp(sketch)
    (site,), refused = find_units(sketch.program(y=out))
    assert (site.name, site.kind, site.columns.shape, not refused) == ("down", "neurons", (32, 1), True)
    assert list(site.weights) == ["down", "up", "up.bias"]


def test_a_residual_stream_is_no_site():
    sketch = Sketch()
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    for i in range(2):
        y = sketch.call(LINEAR, x, sketch.weight(f"{i}.up", 32, 16), None)
        y = sketch.call(LINEAR, sketch.call(aten.gelu.default, y), sketch.weight(f"{i}.down", 16, 32), None)
        x = sketch.call(RMS_NORM, sketch.call(aten.add.Tensor, x, y), sketch.weight(f"{i}.norm", 16), 1e-6)
    sites, refused = find_units(sketch.program(y=x))
    assert [site.name for site in sites] == ["0.down", "1.down"]
    assert not refused


def test_channels_that_are_also_an_output_stay():
    sketch = Sketch()
    hidden, out = mlp(sketch)
    assert reasons(sketch.program(y=out, hidden=hidden)) == {"down": "they are an output of sketch"}


def test_channels_with_two_readers_stay():
    sketch = Sketch()
    hidden, out = mlp(sketch)
    other = sketch.call(LINEAR, hidden, sketch.weight("other", 16, 32), None)
    why = "its channels are read by down, other"
    assert reasons(sketch.program(y=out, z=other)) == {"down": why, "other": why}


@pytest.mark.parametrize("value", [0.5, None])
def test_channels_that_meet_others_stay(value):
    sketch = Sketch()
    hidden, _ = mlp(sketch)
    met = sketch.call(aten.mul.Tensor, hidden, sketch.weight("gain", 32) if value is None else value)
    out = sketch.call(LINEAR, met, sketch.weight("last", 16, 32), None)
    found = reasons(sketch.program(y=out))
    assert found == ({"last": "mul_tensor combines them with values that must stay"} if value is None else {})


def test_what_is_not_known_to_keep_channels_apart_loses_them():
    sketch = Sketch()
    hidden, _ = mlp(sketch)
    out = sketch.call(LINEAR, sketch.call(aten.cumsum.default, hidden, -1), sketch.weight("last", 16, 32), None)
    why = "cumsum_default reads them, and aten.cumsum.default is not known to keep them apart"
    assert reasons(sketch.program(y=out)) == {"last": why}


def test_a_norm_over_hidden_channels_loses_them():
    sketch = Sketch()
    hidden, _ = mlp(sketch)
    normed = sketch.call(LAYER_NORM, hidden, sketch.weight("norm", 32), None, 1e-5)
    out = sketch.call(LINEAR, normed, sketch.weight("last", 16, 32), None)
    assert reasons(sketch.program(y=out)) == {"last": "layer_norm_default looks across all of them"}


def test_a_shared_weight_stays():
    sketch = Sketch()
    _, out = mlp(sketch)
    down = next(node for node in sketch.graph.nodes if node.target == "down")
    up = next(node for node in sketch.graph.nodes if node.target == "up")
    hidden = sketch.call(aten.relu.default, sketch.call(LINEAR, out, up, None))
    program = sketch.program(y=sketch.call(LINEAR, hidden, down, None))
    found = reasons(program)
    assert found["down"] == "its weight down is read at several places"


def test_halves_of_one_product_are_one_site():
    sketch = Sketch()
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    both = sketch.call(aten.chunk.default, sketch.call(LINEAR, x, sketch.weight("both", 64, 16), None), 2, -1)
    hidden = sketch.call(GATED, *(sketch.call(operator.getitem, both, i) for i in (0, 1)), "silu")
    (site,), _ = find_units(sketch.program(y=sketch.call(LINEAR, hidden, sketch.weight("down", 16, 32), None)))
    assert torch.equal(site.units_of(site.producers[0][1]), torch.arange(32).repeat(2))


def test_a_product_that_feeds_two_sites_stays():
    sketch = Sketch()
    x = sketch.call(EMBEDDING, sketch.tokens, sketch.weight("table", 8, 16))
    both = sketch.call(aten.chunk.default, sketch.call(LINEAR, x, sketch.weight("both", 64, 16), None), 2, -1)
    outs = {
        f"y{i}": sketch.call(LINEAR, sketch.call(operator.getitem, both, i), sketch.weight(f"down{i}", 16, 32), None)
        for i in (0, 1)
    }
    why = "both has rows of other sites as well"
    assert reasons(sketch.program(**outs)) == {"down0": why, "down1": why}


def test_attention_with_stated_head_counts():
    (site,), refused = find_units(attend(Sketch()))
    assert (site.name, site.kind, tuple(site.columns.shape), not refused) == ("o", "heads", (2, 8), True)


def test_attention_that_treats_heads_apart_stays():
    assert reasons(attend(Sketch(), mask=True)) == {"o": "attention_default has a mask for each head"}
    assert reasons(attend(Sketch(), sinks=True)) == {"o": "attention_default has a sink for each head"}
    assert reasons(attend(Sketch(), kv_heads=1)) == {"o": "its 16 channels leave together or not at all"}


def test_sizes_that_cannot_be_stated_anew_are_a_reason():
    sketch = Sketch()
    hidden, _ = mlp(sketch)
    folded = sketch.call(aten.view.default, hidden, [-1, 4, 8])  # neuron 8 i + j lies at [i, j]
    flat = sketch.call(aten.flatten.using_ints, folded, 1, 2)
    out = sketch.call(LINEAR, flat, sketch.weight("last", 16, 32), None)
    (site,), _ = find_units(sketch.program(y=out))
    assert resize(site, torch.arange(20)) == "view_default does not hold its units in one dimension"
    rows = resize(site, torch.arange(16))  # whole slices of 8
    assert not isinstance(rows, str)
    assert [args[1] for node, args in rows.items() if node.target is aten.view.default] == [[-1, 2, 8]]


def test_a_wrong_size_is_noticed(monkeypatch):
    from smelt.passes.prune import _shrink

    (site, *_), _ = find_units(captured("gpt2"))
    assert not isinstance(resize(site, torch.tensor([1, 2])), str)
    monkeypatch.setattr(_shrink, "_arguments", lambda node, *_: node.args)  # sizes as they were
    assert resize(site, torch.tensor([1, 2])) == "view_2 states sizes that cannot be changed to fit"


def test_places_are_noticed_not_sizes_alone(monkeypatch):
    """A slice of the right length at the wrong place must not pass."""
    from smelt.passes.prune import _shrink

    (site, *_), _ = find_units(captured("phi3"))
    right = _shrink._bounds

    def shifted(labels, rest, kept):
        dim, start, end, *more = right(labels, rest, kept)
        return (dim, start - 16, end - 16, *more) if start == 32 else (dim, start, end, *more)

    assert not isinstance(resize(site, torch.tensor([1])), str)
    monkeypatch.setattr(_shrink, "_bounds", shifted)
    assert resize(site, torch.tensor([1])) == "slice_3 states sizes that cannot be changed to fit"
