"""Recipes for convolutional nets and for what makes images from text, on the small models beside these tests."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch

from smelt.assets import Assets
from smelt.ir.capture import capture
from smelt.ir.encoding import Bitmap
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.passes.activations.by_value import ByValue
from smelt.passes.activations.crops import Crops
from smelt.passes.base import Samples
from smelt.passes.manager import run
from smelt.passes.prune.drop import Drop
from smelt.passes.prune.reuse import Reuse
from smelt.passes.weights.fold import Fold
from smelt.recipes import load

from ..small import conv, unet
from ..small.shapes import pictures

TOLERANCE = 1e-5  # of the largest output, float32
NULL = (0,) * unet.LENGTH


def held(name: str, measured: Mapping[str, float]) -> None:
    """A recipe's promises for the small model, each of which must be measured."""
    promised = load(name, catalogue()).expect
    assert set(promised) == set(measured)
    for metric, value in measured.items():
        assert promised[metric].holds(value), f"{metric} is {value}"


def same(compiled: Compiled, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs, which must be the interpreter's; in most rows, where a value near a tie may be rounded otherwise."""
    found, wanted = compiled.run(**inputs), interpret(compiled.program, inputs)
    for name, value in wanted.items():
        for factor, agrees in ((1.0, True), (1.05, False)):
            rows = (found[name] * factor - value).abs().flatten(1).amax(1)
            assert (float(rows.median()) < TOLERANCE * float(value.abs().max())) is agrees, name
    return found


@functools.cache
def text() -> Program:
    """The text encoder by itself."""
    return capture(unet.trained().text, (unet.scenes(2, 1)[1],))


def net() -> tuple[Program, dict[str, torch.Tensor]]:
    """The small net with its norms folded, and two pictures."""
    inputs = {"pixels": pictures(2, 3).pixels}
    program = capture(conv.trained(), (inputs["pixels"],))
    Fold().apply(program, None)
    derive(program)
    return program, inputs


def test_crops_change_no_answer() -> None:
    program, inputs = net()
    wanted = interpret(program, inputs)["logits"]
    assert "stands behind 5" in next(Crops(convolutions=6).requires(program))
    assert "9 rows" in next(Crops(grid=9).requires(program))
    crops = Crops(grid=3, convolutions=5)
    assert not list(crops.requires(program))
    outcome = crops.apply(program, None)
    assert len(outcome.done) == 5
    assert outcome.notes["multiplications"]["crops"] > outcome.notes["multiplications"]["whole"]
    assert float((interpret(program, inputs)["logits"] - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max())
    crop = next(iter(program.calls(torch.ops.aten.slice.Tensor)))
    crop.args = (*crop.args[:2], crop.args[2] + 1, crop.args[3] + 1)  # one row aside
    assert float((interpret(program, inputs)["logits"] - wanted).abs().max()) > 100 * TOLERANCE


def test_quantmcu() -> None:
    with pytest.raises(SmeltError, match="add such a width"):
        ByValue(budget=0.1)
    seen, asked = Samples({"pixels": pictures(64, 0).pixels}), pictures(200, 100)
    program = capture(conv.trained(), (asked.pixels[:2],))
    rounded = run(program, load("quantmcu", catalogue()).steps, seen).program
    right = [
        float((interpret(each, {"pixels": asked.pixels})["logits"].argmax(-1) == asked.kind).float().mean())
        for each in (rounded, program)
    ]
    notes = next(record.report["notes"] for record in rounded.history if record.name == "activations.by_value")
    held("quantmcu", {
        "accuracy_ratio": right[0] / right[1],
        "bits_per_activation": notes["bits_per_activation"],
        "outlying_crops": notes["outlying_crops"],
    })  # fmt: skip
    short = load("quantmcu", catalogue(), ["activations.by_value.convolutions=1"]).steps
    same(Compiled(run(program, short, seen).program, {}, Assets()), {"pixels": asked.pixels[:9]})


def test_skrr_and_sd_pruning_on_top() -> None:
    captions, (inputs, _), source = unet.scenes(48, 11)[1], unet.asked(64, 12), unet.trained()
    program = capture(source, tuple(unet.asked(2, 5)[0].values()))
    skrr = load("skrr", catalogue(), [f"prune.reuse.null={list(NULL)}"]).steps
    fewer = run(program, skrr, Samples({**unet.asked(48, 13)[0], "tokens": captions})).program
    shortgpt, whole = text().fork(), text().nbytes
    Drop(share=0.4, unit="block").apply(shortgpt, Samples(captions))
    found, wanted = interpret(fewer, inputs), interpret(program, inputs)
    others = interpret(shortgpt, {"tokens": inputs["tokens"]})["prompt"]
    power = wanted["prompt"].square().mean()
    away = [float((each - wanted["prompt"]).square().mean() / power) for each in (found["prompt"], others)]
    kept = sum(weight.nbytes for name, weight in fewer.weights.items() if name.startswith("text."))
    held("skrr", {
        "parameters_ratio": kept / whole,
        "discrepancy": away[0],
        "discrepancy_ratio": away[0] / away[1],
        "noise_error": float((found["noise"] - wanted["noise"]).square().mean()),
    })  # fmt: skip
    compiled = Compiled(run(fewer, load("sd-pruning", catalogue()).steps).program, {}, Assets())
    sparse = same(compiled, inputs)["noise"]
    weights = [weight.dense() for weight in compiled.program.weights.values()]
    assert sum(isinstance(weight.encoding, Bitmap) for weight in compiled.program.weights.values()) > 30
    held("sd-pruning", {
        "sparsity": sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights),
        "noise_error": float((sparse - found["noise"]).square().mean()),
    })  # fmt: skip


def test_a_part_that_stands_in_reads_its_own_stream() -> None:
    """Held to the modules themselves, called in the order that the notes tell."""
    captions = unet.scenes(8, 1)[1]
    model = unet.trained().text
    program = text().fork()
    outcome = Reuse(share=0.5, null=NULL, beam=1).apply(program, Samples(captions))
    again = outcome.notes["again"]
    assert again
    left_out = set(outcome.done) - set(again)
    x = model.words(captions) + model.places(torch.arange(captions.shape[1]))
    for i in range(len(model.layers)):
        for kind in ("attention", "feedforward"):
            name = f"layer {i}, {kind}"
            layer = model.layers[int(again.get(name, name).split()[1].rstrip(","))]
            if name in left_out:
                continue
            with torch.no_grad():
                if kind == "attention":
                    y = layer.norm1(x)
                    x = x + layer.attention(y, y)
                else:
                    x = x + layer.down(torch.nn.functional.gelu(layer.up(layer.norm2(x))))
    wanted = model.project(model.norm(x)).detach()
    assert float((interpret(program, {"tokens": captions})["prompt"] - wanted).abs().max()) < 1e-4
