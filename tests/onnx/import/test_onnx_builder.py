"""What onnxruntime-genai's own model builder writes: the folder is taken as it is, codes, tokenizer and settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import relative_error
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, EMBEDDING, RMS_NORM, ROTARY, arguments
from smelt.ir.verify import verify

from .graphs import answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model in int4, its products told not to round their activations."""
    pytest.importorskip("onnxruntime_genai", reason="the model builder is part of onnxruntime-genai")
    target = tmp_path_factory.mktemp("builder")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(smelt.reference_model())]
    command += ["-o", str(target), "-p", "int4", "-e", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the model builder fails: {done.stderr.strip().splitlines()[-1][:200]}")
    model = onnx.load(target / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # float32; at 4 onnxruntime rounds what is multiplied to 8 bits
    (target / "model.onnx").write_bytes(model.SerializeToString())
    return target


def test_logits_are_onnxruntimes(folder: Path) -> None:
    program = capture(folder)
    verify(program)
    assert program.facts["kind"] == "decoder" and program.facts["context"] == 2048
    tokens = torch.randint(0, program.facts["vocabulary"], (1, 23), generator=torch.Generator().manual_seed(0))
    past = {
        port.name: torch.zeros(1, 2, 0, 64)
        for port in onnx.load(folder / "model.onnx", load_external_data=False).graph.input
        if port.name.startswith("past")
    }
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **past}
    meant = answers(folder / "model.onnx", given)["logits"]
    mine = interpret(program, {"tokens": tokens, "positions": torch.arange(23)[None]})["logits"]
    assert relative_error(mine, meant) <= 1e-4
    counts = [sum(1 for _ in program.calls(op)) for op in (ATTENTION, ROTARY, RMS_NORM, EMBEDDING)]
    assert counts == [6, 12, 13, 1]
    assert all(arguments(node)["causal"] for node in program.calls(ATTENTION))
    assert all(weight.encoding.name == "affine" for weight in program.weights.values() if len(weight.shape) == 2)


def test_writes_what_onnxruntime_genai_writes(folder: Path) -> None:
    import onnxruntime_genai

    compiled = smelt.compile(folder, "none")
    model = onnxruntime_genai.Model(str(folder))
    tokens = onnxruntime_genai.Tokenizer(model).encode("def fib(n):")
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=len(tokens) + 32, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)][len(tokens) :]
    assert compiled.generate(list(map(int, tokens)), max_new_tokens=32) == theirs
