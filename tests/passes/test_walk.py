"""The walk of calibration text: values as the interpreter has them, of blocks as they are by then, in graph order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import LINEAR, arguments
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes._walk import Walk
from smelt.passes.base import Samples

from .families import captured, random_tokens


def seen(program: Program, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the interpreter computes at every node, by name."""
    found: dict[str, torch.Tensor] = {}
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    given = {"tokens": tokens, "positions": positions, "mask": torch.ones_like(tokens)}
    inputs = {name: given[name] for name in program.inputs}
    with torch.no_grad():
        interpret(program, inputs, watch=lambda node, _, value: found.__setitem__(node.name, value))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_values_are_those_of_the_interpreter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.passes._walk.TOKENS", 24)  # pieces of 2, 2 and 1 rows
    program, tokens = captured(family), random_tokens(5, 12)
    wanted, walk = seen(program, tokens), Walk(program, Samples(tokens))
    for node in program.calls(LINEAR):
        x = arguments(node)["x"]
        pieces = [value for (value,) in walk.values(x)]
        assert len(pieces) == 3
        torch.testing.assert_close(torch.cat(pieces), wanted[x.name], rtol=1e-5, atol=1e-5)


def test_nodes_see_what_is_left_of_those_before(tokens_changed: float = 0.5) -> None:
    program, tokens = captured("llama"), random_tokens(2, 12)
    walk, products = Walk(program, Samples(tokens)), list(program.calls(LINEAR))
    for node in products:
        list(walk.values(arguments(node)["x"]))
        name = str(arguments(node)["weight"].target)
        program.weights[name] = Weight.of(program.weights[name].dense() * tokens_changed)
    (logits,) = zip(*walk.values(program.outputs["logits"]), strict=True)
    torch.testing.assert_close(torch.cat(logits), seen(program, tokens)[program.outputs["logits"].name])


def test_only_the_stream_between_blocks_is_held() -> None:
    program, tokens = captured("llama"), random_tokens(2, 12)
    walk = Walk(program, Samples(tokens))
    *_, last = program.calls(LINEAR)
    list(walk.values(arguments(last)["x"]))
    held = [node.name for node, value in walk._held[0].items() if value.is_floating_point() and value.dim() == 3]
    assert len(held) <= 3, held  # the stream, and the rotary tables


def test_there_is_no_way_back() -> None:
    program = captured("llama")
    walk, products = Walk(program, Samples(random_tokens(1, 8))), list(program.calls(LINEAR))
    list(walk.values(arguments(products[-1])["x"]))
    with pytest.raises(ValueError, match="which the walk has left"):
        list(walk.values(arguments(products[0])["x"]))


def test_numbers_that_are_not_finite_are_named() -> None:
    program = captured("llama")
    node = next(iter(program.calls(LINEAR)))
    name = str(arguments(node)["weight"].target)
    weight = program.weights[name]
    program.weights[name] = replace(weight, parts={"data": weight.dense() * torch.inf})
    with pytest.raises(SmeltError, match=f"{node.name}: the samples give activations that are not finite"):
        list(Walk(program, Samples(random_tokens(1, 8))).values(node))
