"""What raising finds in each family: how often each pattern fires, and that no arithmetic of it is left behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from smelt.ir.capture import hf
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.raising import STEPS, raise_program

from ...families.zoo import CONFIGS, VOCABULARY, model

aten = torch.ops.aten
LAYERS = 2

# per step of raising; llama's, and what other families differ in. Attention and experts are emitted by capture itself.
_LLAMA = {
    "raise_linear": 7 * LAYERS + 1,
    "raise_embedding": 1,
    "raise_layer_norm": 0,
    "raise_rms_norm": 2 * LAYERS + 1,
    "raise_rotary": 2 * LAYERS,
    "raise_gelu": 0,
    "raise_gated": LAYERS,
    "raise_attention": 0,
    "raise_head": 1,
}
_GPT = {
    "raise_linear": 4 * LAYERS + 1,
    "raise_embedding": 2,
    "raise_layer_norm": 2 * LAYERS + 1,
    "raise_rms_norm": 0,
    "raise_rotary": 0,
    "raise_gated": 0,
}
RAISED: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {},
    "mistral_window": {},
    "qwen2": {},
    "qwen3": {"raise_rms_norm": 4 * LAYERS + 1},
    "gemma2": {"raise_rms_norm": 4 * LAYERS + 1},
    "gemma3": {"raise_rms_norm": 6 * LAYERS + 1},
    "granite": {},
    "olmo2": {"raise_rms_norm": 4 * LAYERS + 1},
    "phi3": {"raise_linear": 4 * LAYERS + 1},
    "stablelm": {"raise_layer_norm": 2 * LAYERS + 1, "raise_rms_norm": 0},
    "starcoder2": {
        "raise_linear": 6 * LAYERS + 1,
        "raise_layer_norm": 2 * LAYERS + 1,
        "raise_rms_norm": 0,
        "raise_gated": 0,
    },
    "gpt2": {**_GPT, "raise_gelu": LAYERS},
    "opt": {**_GPT, "raise_linear": 6 * LAYERS + 1},
    "gpt_neox": {**_GPT, "raise_embedding": 1, "raise_rotary": 2 * LAYERS},
    "mixtral": {"raise_linear": 5 * LAYERS + 1, "raise_gated": 0},  # the router's among them; experts are one op
    "qwen3_moe": {"raise_linear": 5 * LAYERS + 1, "raise_rms_norm": 4 * LAYERS + 1, "raise_gated": 0},
    "granite_swa": {"raise_linear": 7 * 4 + 1, "raise_rms_norm": 2 * 4 + 1, "raise_rotary": 2 * 4, "raise_gated": 4},
    # interleaved rotation and a norm without a mean's bias stay ATen
    "cohere": {"raise_rms_norm": 0, "raise_rotary": 0},
}
# arithmetic that a pattern should have taken in
ARITHMETIC = {aten.rsqrt.default, aten.cos.default, aten.sin.default, aten.pow.Tensor_Scalar, aten.neg.default}
NOISE = {aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.linear.default, aten.embedding.default}


def raised(family: str, monkeypatch: Any) -> tuple[Program, Program, dict[str, int]]:
    """The program before raising, after it, and what was counted."""
    kept: list[Any] = []

    def watch(program: Program) -> dict[str, int]:
        kept.append(program.fork())
        kept.append(raise_program(program))
        return kept[1]

    monkeypatch.setattr(hf, "raise_program", watch)
    after = hf.capture_hf(model(family))
    return kept[0], after, kept[1]


@pytest.mark.parametrize("family", RAISED)
def test_every_pattern_fires_as_often_as_it_should(family: str, monkeypatch: Any) -> None:
    before, after, counted = raised(family, monkeypatch)
    written_out = {step.__name__ for step in STEPS} - _LLAMA.keys()  # what exporters write, and transformers does not
    found = {name: count for name, count in counted.items() if name.startswith("raise_")}
    assert {name: count for name, count in found.items() if name not in written_out} == _LLAMA | RAISED[family]
    assert not any(counted[name] for name in written_out if name.startswith("raise_"))
    left = Counter(node.target for node in after.graph.nodes if node.op == "call_function")
    assert not NOISE & left.keys()
    if family != "cohere":
        assert not ARITHMETIC & left.keys(), "no leftovers"
    tokens = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
    inputs = {"tokens": tokens, "positions": torch.arange(11).expand(2, -1) + torch.tensor([[0], [40]])}
    torch.testing.assert_close(
        interpret(after, inputs)["logits"], interpret(before, inputs)["logits"], rtol=1e-5, atol=1e-5
    )


def test_every_family_is_counted() -> None:
    assert set(RAISED) == set(CONFIGS)


def test_raising_twice_changes_nothing(monkeypatch: Any) -> None:
    _, after, _ = raised("gemma2", monkeypatch)
    before = str(after.graph)
    assert all(not count for name, count in raise_program(after).items() if name != "raise_head")
    assert str(after.graph) == before
    assert [step.__name__ for step in STEPS][-1] == "raise_head"
