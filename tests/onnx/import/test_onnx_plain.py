"""Encoders, convolutional nets and plain layers from .onnx files: their answers are onnxruntime's, for every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import relative_error
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, EMBEDDING, LAYER_NORM, LINEAR
from smelt.ir.verify import verify

from ...families.zoo import random_model
from .exports import _quiet
from .graphs import FLOAT, answers, graph, random, saved

TOLERANCE = 1e-5
NOTHING: dict[str, Any] = {"name": "nothing", "family": "deploy", "does": "Nothing.", "steps": []}


def perceptron() -> onnx.ModelProto:
    """Gemm with its weight turned, GELU written out, MatMul with a bias behind."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "first", transB=1),
        helper.make_node("Div", ["h", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["shifted"]),
        helper.make_node("Mul", ["h", "shifted"], ["gate"]),
        helper.make_node("Mul", ["gate", "half"], ["act"]),
        helper.make_node("MatMul", ["act", "v"], ["product"], "second"),
        helper.make_node("Add", ["product", "c"], ["y"]),
    ]
    tensors = {"w": random(24, 16), "b": random(24, seed=1), "v": random(24, 8, seed=2), "c": random(8, seed=3)}
    scalars = {"root": 2**0.5, "one": 1.0, "half": 0.5}
    tensors |= {name: np.array(value, np.float32) for name, value in scalars.items()}
    return graph(nodes, {"x": (FLOAT, ["batch", 16])}, {"y": (FLOAT, ["batch", 8])}, tensors, 17)


def convolutional() -> onnx.ModelProto:
    """Convolution with stride and padding, batch norm, pools, flattening and a head."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "deep"], ["d"], group=8, auto_pad="SAME_UPPER"),
        helper.make_node("GlobalAveragePool", ["d"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "head", "bias"], ["y"]),
    ]
    tensors = {"w": random(8, 3, 3, 3), "b": random(8, seed=1), "deep": random(8, 1, 3, 3, seed=2), "bias": random(5)}
    tensors |= {"scale": random(8, seed=3) + 1, "shift": random(8, seed=4), "mean": random(8, seed=5)}
    tensors |= {"variance": np.abs(random(8, seed=6)) + 0.5, "head": random(8, 5, seed=7)}
    return graph(nodes, {"x": (FLOAT, ["batch", 3, 16, 16])}, {"y": (FLOAT, ["batch", 5])}, tensors, 15)


@pytest.mark.parametrize("make", [perceptron, convolutional])
@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_onnxruntimes(make: type, batch: int, tmp_path: Path) -> None:
    path = saved(make(), tmp_path)
    program = capture(path)
    verify(program)
    (name,) = program.inputs
    x = torch.from_numpy(random(batch, *program.facts["inputs"][name]["shape"][1:], scale=1.0))
    mine, meant = interpret(program, {name: x}), answers(path, {name: x})
    assert set(mine) == set(meant)
    assert relative_error(mine["y"], meant["y"]) <= TOLERANCE
    assert relative_error(mine["y"] * 1.05, meant["y"]) > 1e-2
    compiled = smelt.compile(path, NOTHING)
    assert relative_error(compiled.run(x=x)["y"], meant["y"]) <= TOLERANCE


def test_products_end_in_the_dialect(tmp_path: Path) -> None:
    program = capture(saved(perceptron(), tmp_path))
    assert sum(1 for _ in program.calls(LINEAR)) == 2
    assert sum(1 for _ in program.calls(torch.ops.aten.gelu.default)) == 1
    assert program.weights["v"].shape == (8, 24), "turned once, at capture"


def test_an_encoder_keeps_its_mask(tmp_path: Path) -> None:
    """BERT by the older exporter: padding decides, both sizes are free."""
    options = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**options, intermediate_size=64, max_position_embeddings=64)
    source = random_model(config, transformers.AutoModel)
    source.set_attn_implementation("eager")

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = source

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    path, tokens, sizes = tmp_path / "bert.onnx", torch.ones(2, 7, dtype=torch.int64), {0: "batch", 1: "sequence"}
    with _quiet():
        torch.onnx.export(
            Hidden().eval(),
            (tokens, tokens),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": sizes, "attention_mask": sizes},
        )
    program = capture(path)
    verify(program)
    assert program.facts["kind"] == "module"
    counts = [sum(1 for _ in program.calls(op)) for op in (ATTENTION, LAYER_NORM, EMBEDDING)]
    assert counts[:2] == [2, 5] and counts[2] >= 1
    for batch, length in ((1, 5), (3, 30)):
        tokens = torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(tokens)
        mask[-1, length // 2 :] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
        mine, meant = interpret(program, inputs)["hidden"], answers(path, inputs)["hidden"]
        assert relative_error(mine[mask.bool()], meant[mask.bool()]) <= TOLERANCE
        unmasked = interpret(program, inputs | {"attention_mask": torch.ones_like(mask)})["hidden"]
        assert relative_error(unmasked[mask.bool()], meant[mask.bool()]) > 1e-3, "the mask matters"


def test_weights_beside_the_file_are_mapped(tmp_path: Path) -> None:
    """External data, each tensor at an odd place: read where they are used, not copied."""
    model = perceptron()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    program = capture(tmp_path)
    x = torch.from_numpy(random(2, 16, scale=1.0))
    plain = saved(perceptron(), tmp_path / "plain")
    assert torch.equal(interpret(program, {"x": x})["y"], interpret(capture(plain), {"x": x})["y"])
    part = program.weights["w"].parts
    assert not isinstance(part, dict), "no tensor is held in memory"
