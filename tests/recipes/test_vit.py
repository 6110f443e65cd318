"""Recipes for models that see, on the small classifier and the small vision-language model beside these tests."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

import smelt
from smelt.ir.capture import capture
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import LAYER_NORM, LINEAR, arguments
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.passes.activations._static import Grid, entropy
from smelt.passes.base import Pass, Samples
from smelt.passes.search._relevance import relevance
from smelt.passes.search.ranges import Ranges, partition
from smelt.passes.search.relevance import Relevance, allocate
from smelt.passes.weights.scale import Scale
from smelt.recipes import load

from ..small import vit, vlm
from ..small.shapes import pictures

SEEDS = range(4)


def kl(meant: torch.Tensor, given: torch.Tensor) -> float:
    """KL(meant || given) of logits in nats, the mean over answers."""
    laws = meant.log_softmax(-1), given.log_softmax(-1)
    return float((laws[0].exp() * (laws[0] - laws[1])).sum(-1).mean())


def held(name: str, measured: Mapping[str, float]) -> None:
    """A recipe's promises for the small model, each of which must be measured."""
    promised = load(name, catalogue()).expect
    assert set(promised) == set(measured)
    for metric, value in measured.items():
        assert promised[metric].holds(value), f"{metric} is {value}"


def built(compiled: Compiled, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The kernels' logits, which must be the interpreter's but where a sum in another order rounds elsewhere."""
    found, wanted = compiled.run(**inputs)["logits"], interpret(compiled.program, inputs)["logits"]
    assert kl(wanted, found) < 1e-3 < kl(wanted, 1.2 * found)
    assert float((found.argmax(-1) == wanted.argmax(-1)).float().mean()) > 0.98
    return found


def after(program: Program, steps: list[Pass], samples: Samples) -> Program:
    """A fork behind some passes."""
    made = program.fork()
    for step in steps:
        derive(made)
        assert not list(step.requires(made))
        step.apply(made, samples)
    return made


def seeing() -> tuple[Program, torch.Tensor, torch.Tensor]:
    """The classifier, pictures, and what it answers."""
    pixels = pictures(200, 7).pixels
    program = capture(vit.trained(), (pixels[:2],))
    derive(program)
    return program, pixels, interpret(program, {"pixels": pixels})["logits"]


class Residual(nn.Module):
    """Two products behind each other, beside a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x [B, 64] → logits [B, 8]."""
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))))}


def test_relevance_is_what_positive_terms_pass_on() -> None:
    """Written by hand for one product behind a sum: the z+ rule, then shares by magnitude."""
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(5, 64)
    program = capture(model, (x[:2],))
    derive(program)
    found = {str(arguments(n)["weight"].target): r for n, r in relevance(program, Samples({"x": x})).items()}
    with torch.no_grad():
        added = model.down(torch.relu(model.up(x)))
        terms = ((x + added) * model.head.weight[model(x)["logits"].argmax(-1)]).clamp_min(0)
        shares = terms / terms.sum(-1, keepdim=True) * added.abs() / (added.abs() + x.abs())
    assert found["head.weight"] == pytest.approx(1)
    assert found["down.weight"] == pytest.approx(float(shares.sum() / 5), rel=1e-4)
    assert found["up.weight"] == pytest.approx(found["down.weight"], rel=1e-4)  # no relevance is lost in between


def test_widths_keep_to_their_budget() -> None:
    sizes = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]
    assert allocate([1, 1, 1], sizes, (3, 4, 8), 4) == [4, 4, 4]
    chosen = allocate([0.1, 5, 0.2], sizes, (3, 4, 5, 8), 4)
    assert chosen[1] == max(chosen) > 4
    assert all(sum(share * width for share, width in zip(each, chosen, strict=True)) <= 4 for each in sizes)
    with pytest.raises(SmeltError, match="the least width is 3"):
        Relevance(bits=2)


def test_even_channels_mean_the_same() -> None:
    program, pixels, wanted = seeing()
    samples = Samples({"pixels": pixels[:16]})
    made = after(program, [Scale(rule="even", which=("norm",), clip=0)], samples)
    error = float((interpret(made, {"pixels": pixels})["logits"] - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5
    values: dict[str, torch.Tensor] = {}
    interpret(made, samples.inputs, watch=lambda node, args, value: values.update({node.name: value}))
    norm = next(iter(made.calls(LAYER_NORM)))
    low, high = (getattr(values[norm.name].flatten(0, 1), end)(0) for end in ("amin", "amax"))
    torch.testing.assert_close(high, -low, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(high, high.mean().expand_as(high), rtol=1e-3, atol=1e-4)
    name = str(arguments(next(iter(made.calls(LINEAR))))["bias"].target)
    made.weights[name] = program.weights[name]  # the middle is not given back
    assert float((interpret(made, {"pixels": pixels})["logits"] - wanted).abs().max() / wanted.abs().max()) > 1e-3


def test_grids_hold_zero() -> None:
    grid, x = Grid.over(-0.3, 1.2, 4), torch.linspace(-1, 2, 97)
    values = grid.low + grid.step * grid.codes(x)
    assert grid.codes(x).unique().tolist() == list(range(16))
    assert float((values - x.clamp(grid.low, grid.high)).abs().max()) <= grid.step / 2 + 1e-6
    assert float(values.abs().min()) < 1e-6
    assert entropy(torch.tensor([0, 1, 2, 3])) == pytest.approx(2)
    assert partition([3, 1, 3, 3, 3, 3, 1, 1], 3) == [range(1), range(1, 4), range(4, 6), range(6, 7), range(7, 8)]


def test_lrp_qvit() -> None:
    program, pixels, meant = seeing()
    recipe = load("lrp-qvit", catalogue())
    lost = {"mixed": 0.0, "uniform": 0.0, "finer": 0.0, "finer uniform": 0.0}
    for seed in SEEDS:
        samples = Samples({"pixels": pictures(32, 100 + seed).pixels})
        even = after(program, [recipe.steps[0].pass_], samples)
        for name, bits, widths in (
            ("mixed", 4, (3, 4, 5, 6, 8)),
            ("uniform", 4, (4,)),
            ("finer", 6, (3, 4, 5, 6, 8)),
            ("finer uniform", 6, (6,)),
        ):
            made = after(even, [Relevance(bits=bits, widths=widths)], samples)
            lost[name] += kl(meant, interpret(made, {"pixels": pixels})["logits"]) / len(SEEDS)
    seen, asked = pictures(37, 100), pictures(200, 7)
    compiled = smelt.compile(vit.trained(), recipe, example=(pixels[:2],), calibration={"pixels": seen.pixels})
    notes = compiled.program.history[-1].report["notes"]
    logits = built(compiled, {"pixels": pixels})
    held("lrp-qvit", {
        "bits_per_weight": notes["bits_per_weight"],
        "bits_per_activation": notes["bits_per_activation"],
        "bytes_ratio": compiled.program.nbytes / program.nbytes,
        "accuracy_ratio": vit.right(logits, asked) / vit.right(meant, asked),
        "kl_of_uniform": lost["mixed"] / lost["uniform"],
        "kl_of_uniform_at_6": lost["finer"] / lost["finer uniform"],
    })  # fmt: skip


def test_q_vlm() -> None:
    seen, asked = pictures(37, 100), pictures(200, 7)
    given = {"pixels": asked.pixels, "tokens": vlm.questions(asked, 7)[0]}
    follows = vlm.questions(asked, 7)[1]
    sample = {"pixels": seen.pixels, "tokens": vlm.questions(seen, 100)[0]}
    program = capture(vlm.trained(), tuple(value[:2] for value in given.values()))
    derive(program)
    meant = interpret(program, given)["logits"]
    compiled = smelt.compile(
        vlm.trained(), "q-vlm", example=tuple(value[:2] for value in given.values()), calibration=sample
    )
    logits = built(compiled, given)
    whole = after(program, [Ranges(least=1)], Samples({name: value[:32] for name, value in sample.items()}))
    notes = compiled.program.history[-1].report["notes"]
    assert max(len(block["shares"]) for block in notes["blocks"]) == 3
    held("q-vlm", {
        "bits_per_weight": notes["bits_per_weight"],
        "bytes_ratio": compiled.program.nbytes / program.nbytes,
        "accuracy_ratio": vlm.right(logits, follows) / vlm.right(meant, follows),
        "kl_of_whole_ranges": kl(meant, logits) / kl(meant, interpret(whole, given)["logits"]),
    })  # fmt: skip
