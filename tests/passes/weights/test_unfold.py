"""Convolutions as products: equal answers, weights that passes on products reach, and reasons where none was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import smelt
from smelt.ir.capture import capture
from smelt.ir.interpret import interpret
from smelt.ir.ops import LINEAR
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.passes.weights.fold import Fold
from smelt.passes.weights.unfold import Unfold

TOLERANCE = 1e-5  # of the largest output, float32


def net() -> nn.Module:
    """Windows of every kind, norms with and without gains; the fourth convolution is in groups."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, (3, 2), stride=2, padding="valid", dilation=2, bias=False),
        nn.BatchNorm2d(16, affine=False),
        nn.Conv2d(16, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 6, 2, 2),
    )
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 2)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 2)
                layer.bias.data.normal_()
    return nn.Sequential(*layers).eval()


PIXELS = torch.randn(2, 3, 13, 12, generator=torch.Generator().manual_seed(1))


def answer(program: Program) -> torch.Tensor:
    return interpret(program, {"input": PIXELS})["output0"]


def test_answers_stay_and_every_weight_counts() -> None:
    source = capture(net(), (PIXELS,))
    program = source.fork()
    folded = Fold().apply(program, None)
    outcome, wanted = Unfold().apply(program, None), answer(source)
    assert float((answer(program) - wanted).abs().max() / wanted.abs().max()) < TOLERANCE
    assert len(folded.done) == 3 and len(outcome.done) == 5 and len(list(program.calls(LINEAR))) == 5
    assert outcome.skipped == {"conv2d_3": "its 4 groups read channels of their own: no one matrix product"}
    assert not Unfold().apply(program, None).done
    for name, weight in program.weights.items():
        wrong = program.fork()
        wrong.weights[name] = Weight.of(weight.dense() * 1.05)
        assert float((answer(wrong) - wanted).abs().max() / wanted.abs().max()) > 10 * TOLERANCE, name


def test_an_image_of_any_size_stays() -> None:
    program = capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), (PIXELS,))
    program.facts["inputs"]["input"]["shape"] = ["B", 3, "H", 12]
    derive(program)
    (why,) = Unfold().apply(program, None).skipped.values()
    assert why.endswith("have no fixed height and width")


def test_passes_on_products_reach_them_and_they_export(tmp_path: Path) -> None:
    steps = [{"weights.fold": {}}, {"weights.unfold": {}}, {"weights.quantize": {"bits": 4, "group": 32}}]
    recipe = {"name": "small", "family": "weights", "does": "Convolutions in 4 bits.", "steps": steps}
    compiled = smelt.compile(net(), recipe, example=(PIXELS,))
    stored = {name: weight.bits / weight.dense().numel() for name, weight in compiled.program.weights.items()}
    assert {name for name, bits in stored.items() if bits == 4.5} == {"8.weight", "9.weight"}
    wanted = answer(compiled.program)
    assert float((compiled.run(input=PIXELS)["output0"] - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    pytest.importorskip("onnxruntime")
    assert compiled.export_onnx(tmp_path / "folder").error < 1e-4
