"""activations.quantize: one rounding a tensor, every product accounted for, and the numbers of the op alone."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import EXPERTS, HEAD, LINEAR, QUANTIZED, arguments, is_op
from smelt.ir.program import Program
from smelt.ir.verify import verify
from smelt.passes import catalogue
from smelt.passes.activations.quantize import Quantize
from smelt.passes.base import Exactness
from smelt.passes.manager import StepFailed, run
from smelt.recipes import Step

from ..families import captured

FAMILIES = ("llama", "gpt2", "gemma2", "bert")


def products(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if is_op(node, LINEAR, HEAD)]


def inputs(program: Program) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    given = {"tokens": ids, "positions": torch.arange(9).expand(2, -1)}
    return {name: given.get(name, torch.zeros_like(ids)) for name in program.inputs}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_reads_rounded_values(family: str) -> None:
    program = captured(family)
    read = {node.name: arguments(node)["x"] for node in products(program)}
    outcome = Quantize(bits=8, group=32).apply(program, None)
    verify(program)
    assert set(outcome.done) == {node.name for node in products(program)} and not outcome.skipped
    for node in products(program):
        rounded = arguments(node)["x"]
        assert is_op(rounded, QUANTIZED)
        assert arguments(rounded) == {"x": read[node.name], "bits": 8, "group": 32}
    assert len(list(program.calls(QUANTIZED))) == len(set(read.values()))  # q, k and v share one
    assert len(set(read.values())) < len(read) or family == "gpt2"  # which has one matrix for the three
    assert program.touched == {"activations"} and outcome.notes == {"bits_per_activation": 9.0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16), (8, 0)])
def test_the_numbers_are_those_of_the_op(family: str, bits: int, group: int) -> None:
    """The interpreter on the original, with every product's input rounded on its way, gives the same bits."""
    plain, program = captured(family), captured(family)
    Quantize(bits=bits, group=group).apply(program, None)  # type: ignore[arg-type]
    given = inputs(program)
    with torch.no_grad():
        found, wanted = interpret(program, given), rounding(plain, given, bits, group)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        other = rounding(plain, given, bits, 64 if group else 32)
        assert any(not torch.equal(found[name], other[name]) for name in wanted)


def rounding(program: Program, given: dict[str, torch.Tensor], bits: int, group: int) -> dict[str, torch.Tensor]:
    """The program where linear layers round what they read."""
    values: dict[fx.Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = given[str(node.target)]
        elif node.op == "get_attr":
            values[node] = program.weights[str(node.target)].dense()
        elif node.op == "output":
            return {name: values[value] for name, value in node.args[0].items()}  # type: ignore[misc]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if is_op(node, LINEAR, HEAD):
                args = (QUANTIZED.target(args[0], bits, group or args[0].shape[-1]), *args[1:])
            values[node] = node.target(*args, **kwargs)
    raise AssertionError("no output")


def test_what_is_left_alone_has_a_reason() -> None:
    program = captured("llama")
    head = next(program.calls(HEAD)).name
    outcome = Quantize(group=128, head=False).apply(program, None)
    reasons = {why for name, why in outcome.skipped.items() if name != head}
    assert outcome.skipped[head] == "the vocabulary head, and head is false"
    assert reasons == {"its rows of 64 are no multiple of 128"}
    done = [node for node in products(program) if node.name in outcome.done]
    assert done and all(arguments(node)["x"].meta.get("shape", (128,))[-1] == 128 for node in done)
    assert set(outcome.done) | outcome.skipped.keys() == {node.name for node in products(program)}
    experts = captured("mixtral")
    skipped = Quantize().apply(experts, None).skipped
    assert skipped == {node.name: "routed experts keep their input" for node in experts.calls(EXPERTS)}


def test_nothing_to_do_touches_nothing() -> None:
    program = captured("llama")
    outcome = Quantize(group=7).apply(program, None)
    assert outcome.done == () and len(outcome.skipped) == len(products(program))
    assert program.touched == set() and not list(program.calls(QUANTIZED))


def test_a_second_rounding_is_refused() -> None:
    program = captured("llama")
    assert list(Quantize().requires(program)) == []
    Quantize().apply(program, None)
    (problem,) = Quantize().requires(program)
    assert problem.endswith("must not be rounded yet, but is")
    steps = [Step(name, "activations.quantize", Quantize(), {}) for name in ("once", "twice")]
    with pytest.raises(StepFailed, match=r"twice.*must not be rounded yet, but is since"):
        run(captured("llama"), steps)


def test_the_step_says_what_it_is() -> None:
    assert catalogue()["activations.quantize"] is Quantize
    assert Quantize.exactness is Exactness.APPROXIMATE and Quantize.effects == {"numerics"}
    assert Quantize() == Quantize(bits=8, group=32, head=True)
    assert "bits_per_activation" not in Quantize(group=0).apply(captured("llama"), None).notes


def test_a_group_of_fewer_than_none_is_refused() -> None:
    with pytest.raises(SmeltError, match=r"group is a count of activations \(0: the whole row\), but is -1"):
        Quantize(group=-1)
