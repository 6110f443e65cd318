"""Capture's check can fail: one op changed, one window off by one, one token mixed in, and it says so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from smelt.ir.capture.check import TOLERANCE, check_against_source, probe_places
from smelt.ir.capture.hf import capture_hf
from smelt.ir.errors import SmeltError
from smelt.ir.ops import ATTENTION, GATED, HEAD, LINEAR, RMS_NORM, ROTARY, arguments
from smelt.ir.program import Program
from smelt.ir.weight import Weight

aten = torch.ops.aten
CONTEXT, WINDOW = 4096, 300  # both far longer than the probe


@pytest.fixture(scope="module")
def source() -> Any:
    """A gemma2: softcaps, a window in one layer of two, weights stored minus one."""
    config = transformers.Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=61,
        max_position_embeddings=CONTEXT,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 0.05)
    return model


@pytest.fixture(scope="module")
def _captured(source: Any) -> Program:
    return capture_hf(source)


@pytest.fixture
def program(_captured: Program) -> Program:
    return _captured.fork()


def check(program: Program, source: Any) -> None:
    weights = {name: Weight.of(p) for name, p in source.named_parameters()}
    check_against_source(program, source, weights, decoder=True)


def argument(program: Program, op: Any, name: str, value: Any, which: int = 0) -> None:
    """Set one argument of the `which`-th call of an op."""
    node = list(program.calls(op))[which]
    changed = arguments(node) | {name: value}
    node.args, node.kwargs = tuple(changed[key] for key in op.arguments), {}


def replaced(program: Program, node: fx.Node, by: Callable[..., Any], *more: Any) -> None:
    """node → by(node, *more)."""
    with program.graph.inserting_after(node):
        call = program.graph.call_function(by, (node, *more))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def mixed(program: Program) -> None:
    """The stream takes in the token before, as a convolution would."""
    node = next(n for n in program.calls(aten.add.Tensor))
    replaced(program, node, aten.roll.default, [1], [1])


MUTANTS: dict[str, Callable[[Program], None]] = {
    "another activation": lambda p: argument(p, GATED, "act", "relu"),
    "no softcap on attention": lambda p: argument(p, ATTENTION, "softcap", None),
    "a softcap 5 % off": lambda p: argument(p, ATTENTION, "softcap", 2.1, 1),
    "a scale 5 % off": lambda p: argument(p, ATTENTION, "scale", 1.05 * 224**-0.5),
    "a window too short by one": lambda p: argument(p, ATTENTION, "window", WINDOW - 1),
    "a window too long by one": lambda p: argument(p, ATTENTION, "window", WINDOW + 1),
    "no window": lambda p: argument(p, ATTENTION, "window", None),
    "a window in the other layer too": lambda p: argument(p, ATTENTION, "window", WINDOW, 1),
    "no offset of a norm's weight": lambda p: argument(p, RMS_NORM, "offset", 0.0),
    "another epsilon": lambda p: argument(p, RMS_NORM, "eps", 1e-3),
    "a scaled rotation": lambda p: argument(p, ROTARY, "scale", 1.01),
    "keys that are not rotated": lambda p: list(p.calls(ROTARY))[1].replace_all_uses_with(
        list(p.calls(ROTARY))[1].args[0]
    ),
    "no softcap on the logits": lambda p: p.set_output("logits", next(p.calls(HEAD))),
    "a projection left out": lambda p: replaced(p, list(p.calls(LINEAR))[3], operator.mul, 0.0),
    "a token that sees its neighbour": mixed,
}


def test_a_sound_capture_passes(program: Program, source: Any) -> None:
    check(program, source)
    assert program.facts["capture_error"] <= TOLERANCE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_graph_is_caught(mutant: str, program: Program, source: Any) -> None:
    MUTANTS[mutant](program)
    with pytest.raises(SmeltError, match=r"gemma2: the captured graph differs from transformers' eager model"):
        check(program, source)


def test_a_weight_that_lost_a_row_is_caught(program: Program, source: Any) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    broken = program.weights[name].dense().clone()
    broken[-1] = 0
    program.weights[name] = Weight.of(broken)
    with pytest.raises(SmeltError, match="differs"):
        check(program, source)


def test_probes_stand_on_both_sides_of_every_window(program: Program) -> None:
    places = probe_places(program).tolist()
    apart = {b - a for a in places for b in places if b > a}
    assert {WINDOW - 1, WINDOW, CONTEXT - 1} <= apart
    assert len(places) < 32 < WINDOW, "the probe itself is short"


def test_a_model_whose_tokens_meet_outside_attention_is_refused(source: Any) -> None:
    class Shifted(type(source)):  # type: ignore[misc]  # the class of a fixture
        """Adds the embedding of the token before, like a token shift or a convolution of width two."""

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            words = self.model.embed_tokens(input_ids)
            before = torch.nn.functional.pad(words, (0, 0, 1, 0))[:, :-1]
            return super().forward(inputs_embeds=words + before, **options)

    shifted = Shifted(source.config).eval()
    shifted.load_state_dict(source.state_dict())
    with pytest.raises(SmeltError, match="tokens depend on each other outside causal attention"):
        capture_hf(shifted)


def test_a_mask_that_is_more_than_a_window_is_caught_in_a_short_probe(source: Any, monkeypatch: Any) -> None:
    """Chunks of 1024: nothing that 30 tokens side by side could see."""
    from transformers.models.gemma2 import modeling_gemma2

    plain = modeling_gemma2.create_causal_mask

    def chunked(*args: Any, **options: Any) -> Any:
        return plain(*args, **options, and_mask_function=lambda b, h, q, k: q // 1024 == k // 1024)

    monkeypatch.setattr(modeling_gemma2, "create_causal_mask", chunked)
    with pytest.raises(SmeltError, match="differs"):
        capture_hf(source)


@contextmanager
def scaled(parameter: torch.nn.Parameter, by: torch.Tensor) -> Iterator[None]:
    """The parameter times something; its old storage stays as it was."""
    before, parameter.data = parameter.data, parameter.data * by
    try:
        yield
    finally:
        parameter.data = before


def test_weights_that_are_not_finite_are_named(source: Any) -> None:
    weight = source.model.layers[1].mlp.up_proj.weight
    hole = torch.ones_like(weight)
    hole[3, 4] = torch.nan
    reason = r"not finite; weight 'model.layers.1.mlp.up_proj.weight' holds NaN"
    with scaled(weight, hole), pytest.raises(SmeltError, match=reason):
        capture_hf(source)


def test_an_overflow_is_told_from_a_broken_weight(source: Any) -> None:
    weight = source.model.layers[0].mlp.down_proj.weight
    reason = "every weight is finite, so an op overflows"
    with scaled(weight, torch.tensor(1e38)), pytest.raises(SmeltError, match=reason):
        capture_hf(source)


def test_a_forward_that_fails_is_reported(program: Program, source: Any, monkeypatch: Any) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("no luck\nat all")

    monkeypatch.setattr(type(source), "forward", fails)
    with pytest.raises(SmeltError, match=r"gemma2: transformers' own eager forward fails: no luck$"):
        check(program, source)


def test_transformers_is_left_as_it_was(source: Any) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    before = AttentionMaskInterface()["eager"], source.config._attn_implementation
    tensors = {name: id(p) for name, p in source.named_parameters()}
    capture_hf(source)
    assert (AttentionMaskInterface()["eager"], source.config._attn_implementation) == before
    assert {name: id(p) for name, p in source.named_parameters()} == tensors
