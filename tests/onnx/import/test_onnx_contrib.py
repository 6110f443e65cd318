"""Microsoft's ops by hand: a decoder of grouped-query attention and 4-bit products, as onnxruntime-genai's builder
writes it, and quantized weights in each layout; answers are onnxruntime's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import relative_error
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, EMBEDDING, LINEAR, RMS_NORM, ROTARY, arguments
from smelt.ir.verify import verify

from .graphs import FLOAT, INT64, answers, graph, random, saved

MS = "com.microsoft"
V, K, H, G, D, I, CONTEXT, BLOCK = 64, 64, 4, 2, 16, 128, 96, 32
TOLERANCE = 1e-4


def quantized(name: str, n: int, k: int, zeros: bool = False, bits: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """Random codes of a product [n, k] in MatMulNBits' layout."""
    made = np.random.default_rng(len(name) + n)
    blocks = -(-k // BLOCK)
    tensors = {f"{name}_Q4": made.integers(0, 256, (n, blocks, BLOCK * bits // 8), dtype=np.uint8)}
    tensors[f"{name}_scales"] = (made.random((n, blocks)) * 0.03 + 0.01).astype(np.float32)
    if zeros:
        tensors[f"{name}_zp"] = made.integers(0, 256, (n, -(-blocks * bits // 8)), dtype=np.uint8)
    return tensors


def product(x: str, name: str, out: str, n: int, k: int, zeros: bool = False, bits: int = 4) -> onnx.NodeProto:
    inputs = [x, f"{name}_Q4", f"{name}_scales", *([f"{name}_zp"] if zeros else [])]
    return helper.make_node("MatMulNBits", inputs, [out], out, domain=MS, K=k, N=n, bits=bits, block_size=BLOCK)


def decoder(zeros: bool = False, **attention: Any) -> onnx.ModelProto:
    """Two layers: skip norms, packed attention with rotary embedding inside, a gated MLP, all products 4-bit."""
    angles = np.arange(CONTEXT)[:, None] * (1.0 / 10000 ** (np.arange(0, D, 2) / D)).astype(np.float32)
    tensors = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    tensors |= {"embed": random(V, K, scale=0.5), "one": np.array([1], np.int64), "place": np.array(1, np.int64)}
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["total"], keepdims=0),
        helper.make_node("Sub", ["total", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "place"], ["longest"], axis=0),
        helper.make_node("Cast", ["longest"], ["most"], to=TensorProto.INT32),
        helper.make_node("Gather", ["embed", "input_ids"], ["x0"]),
        helper.make_node("SimplifiedLayerNormalization", ["x0", "norm0"], ["n0"], epsilon=1e-6),
    ]
    tensors["norm0"] = random(K, seed=9) + 1
    skip, inputs, outputs = "x0", {}, {}
    for i in range(2):
        sizes = {"qkv": ((H + 2 * G) * D, K), "o": (K, H * D), "gate": (I, K), "up": (I, K), "down": (K, I)}
        for part, (n, k) in sizes.items():
            tensors |= quantized(f"layers.{i}.{part}", n, k, zeros)
        tensors |= {f"layers.{i}.norm": random(K, seed=i) + 1, f"layers.{i}.out": random(K, seed=20 + i) + 1}
        past, present = (
            [f"past_key_values.{i}.{p}" for p in ("key", "value")],
            [f"present.{i}.{p}" for p in ("key", "value")],
        )
        options = {"num_heads": H, "kv_num_heads": G, "do_rotary": 1, **attention}
        operands = [f"qkv{i}", "", "", *past, "lengths", "most", "cos", "sin"]
        call = {name: f"layers.{i}.{name}" for name in sizes}
        nodes += [
            product(f"n{i}", call["qkv"], f"qkv{i}", *sizes["qkv"], zeros),
            helper.make_node(
                "GroupQueryAttention", operands, [f"a{i}", *present], f"attention{i}", domain=MS, **options
            ),
            product(f"a{i}", call["o"], f"o{i}", *sizes["o"], zeros),
            _skip(skip, f"o{i}", f"layers.{i}.norm", f"m{i}", f"y{i}"),
            product(f"m{i}", call["gate"], f"gate{i}", *sizes["gate"], zeros),
            product(f"m{i}", call["up"], f"up{i}", *sizes["up"], zeros),
            helper.make_node("Sigmoid", [f"gate{i}"], [f"s{i}"]),
            helper.make_node("Mul", [f"gate{i}", f"s{i}"], [f"silu{i}"]),
            helper.make_node("Mul", [f"silu{i}", f"up{i}"], [f"mlp{i}"]),
            product(f"mlp{i}", call["down"], f"d{i}", *sizes["down"], zeros),
            _skip(f"y{i}", f"d{i}", f"layers.{i}.out", f"n{i + 1}", f"z{i}"),
        ]
        skip = f"z{i}"
        inputs |= {name: (FLOAT, ["batch", G, "past", D]) for name in past}
        outputs |= {name: (FLOAT, ["batch", G, "total", D]) for name in present}
    tensors |= quantized("head", V, K, zeros)
    nodes.append(product("n2", "head", "logits", V, K, zeros))
    told = {"input_ids": (INT64, ["batch", "sequence"]), "attention_mask": (INT64, ["batch", "total"]), **inputs}
    return graph(nodes, told, {"logits": (FLOAT, ["batch", "sequence", V]), **outputs}, tensors)


def _skip(x: str, y: str, norm: str, out: str, total: str) -> onnx.NodeProto:
    return helper.make_node(
        "SkipSimplifiedLayerNormalization", [x, y, norm], [out, "", "", total], domain=MS, epsilon=1e-6
    )


def run(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """onnxruntime's logits of a text without a past."""
    empty = torch.zeros(tokens.shape[0], G, 0, D)
    past = {f"past_key_values.{i}.{p}": empty for i in range(2) for p in ("key", "value")}
    return answers(path, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **past})["logits"]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("options", [{}, {"local_window_size": 5, "scale": 0.3}])
def test_a_decoder_of_contributed_ops(zeros: bool, options: dict[str, Any], tmp_path: Path) -> None:
    path = saved(decoder(zeros, **options), tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"context_length": 80, "eos_token_id": [7]}}))
    program = capture(tmp_path)
    verify(program)
    assert (program.facts["context"], program.facts["eos"]) == (80, [7])
    tokens = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(17).expand(2, -1)
    mine = interpret(program, {"tokens": tokens, "positions": positions})["logits"]
    assert relative_error(mine, run(path, tokens)) <= TOLERANCE
    off = interpret(program, {"tokens": tokens, "positions": positions * 2})["logits"]
    assert relative_error(off, run(path, tokens)) > 1e-2, "positions matter"
    assert len(list(program.calls(ROTARY))) == 4 and len(list(program.calls(RMS_NORM))) == 5
    assert [arguments(a)["window"] for a in program.calls(ATTENTION)] == [options.get("local_window_size")] * 2
    assert program.weights["layers.0.qkv"].encoding == Affine(4, BLOCK, zero=zeros, scale="float32"), (
        "codes are kept, not decoded"
    )


def test_generates_what_onnxruntime_generates(tmp_path: Path) -> None:
    path = saved(decoder(), tmp_path)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    for _ in range(16):
        tokens = torch.cat([tokens, run(path, tokens)[:, -1:].argmax(-1)], 1)
    compiled = smelt.compile(path, "none")
    assert compiled.generate([3, 1, 4, 1, 5], max_new_tokens=16) == tokens[0, 5:].tolist()


def test_codes_that_have_no_packing_are_decoded_with_a_note(tmp_path: Path) -> None:
    """36 columns fill no whole block."""
    tensors = quantized("w", 8, 36)
    made = graph([product("x", "w", "y", 8, 36)], {"x": (FLOAT, ["batch", 36])}, {"y": (FLOAT, ["batch", 8])}, tensors)
    path = saved(made, tmp_path)
    program = capture(path)
    x = torch.from_numpy(random(3, 36, scale=1.0))
    assert relative_error(interpret(program, {"x": x})["y"], answers(path, {"x": x})["y"]) <= TOLERANCE
    assert "'w_Q4' is decoded" in program.facts["notes"][0]


@pytest.mark.parametrize("kind", ["int8 rows", "int8 columns", "uint8 matrix", "int4 blocks"])
def test_dequantized_weights_keep_their_codes(kind: str, tmp_path: Path) -> None:
    """DequantizeLinear over a stored [K, N] matrix, in front of MatMul."""
    made = np.random.default_rng(0)
    options: dict[str, Any] = {"axis": 1}
    tensors: dict[str, Any] = {"s": (made.random(16) * 0.02 + 0.01).astype(np.float32)}
    tensors["w"] = made.integers(-128, 128, (64, 16), dtype=np.int8)
    if kind == "uint8 matrix":
        tensors |= {"w": made.integers(0, 256, (64, 16), dtype=np.uint8), "s": np.array(0.02, np.float32)}
        tensors["z"] = np.array(131, np.uint8)
    elif kind == "int4 blocks":
        tensors["s"] = (made.random((2, 16)) * 0.02 + 0.01).astype(np.float32)
        options = {"axis": 0, "block_size": 32}
    elif kind == "int8 rows":
        tensors["s"], options = (made.random(64) * 0.02 + 0.01).astype(np.float32), {"axis": 0}
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["w", "s", *(["z"] if "z" in tensors else [])], ["d"], "decode", **options
        ),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    codes = tensors.pop("w") if kind == "int4 blocks" else None
    model = graph(nodes, {"x": (FLOAT, ["batch", 64])}, {"y": (FLOAT, ["batch", 16])}, tensors)
    if codes is not None:
        packed = (codes.reshape(-1, 2)[:, 0] & 15) | ((codes.reshape(-1, 2)[:, 1] & 15) << 4)
        model.graph.initializer.append(
            helper.make_tensor("w", TensorProto.INT4, [64, 16], packed.astype(np.uint8).tobytes(), raw=True)
        )
    path = saved(model, tmp_path)
    program = capture(path)
    x = torch.from_numpy(random(3, 64, scale=1.0))
    assert relative_error(interpret(program, {"x": x})["y"], answers(path, {"x": x})["y"]) <= TOLERANCE
    if kind == "int8 rows":
        return  # scales along the summed axis are no encoding of ours; the graph decodes
    (weight,) = (arguments(node)["weight"] for node in program.calls(LINEAR))
    expected = {
        "int8 columns": Affine(8, 0, scale="float32"),
        "uint8 matrix": Affine(8, 0, zero=True, scale="float32"),
        "int4 blocks": Affine(4, 32, scale="float32"),
    }
    assert program.weights[str(weight.target)].encoding == expected[kind]


def test_embeddings_in_blocks_are_shared_with_the_head(tmp_path: Path) -> None:
    """The builder stores one table for both, and reshapes it for the look-up."""
    tensors = quantized("head", V, K) | {"two": np.array([V, K // 2], np.int64)}
    options = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    nodes = [
        helper.make_node("Reshape", ["head_Q4", "two"], ["flat"]),
        helper.make_node("GatherBlockQuantized", ["flat", "ids", "head_scales"], ["x"], domain=MS, **options),
        product("x", "head", "y", V, K),
    ]
    path = saved(graph(nodes, {"ids": (INT64, ["batch", 5])}, {"y": (FLOAT, ["batch", 5, V])}, tensors), tmp_path)
    program = capture(path)
    ids = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(0))
    assert relative_error(interpret(program, {"ids": ids})["y"], answers(path, {"ids": ids})["y"]) <= TOLERANCE
    assert len(list(program.calls(EMBEDDING))) == len(list(program.calls(LINEAR))) == 1
    assert list(program.weights) == ["head"]


def test_a_quantized_cache_is_refused(tmp_path: Path) -> None:
    path = saved(decoder(k_quant_type="PER_TENSOR"), tmp_path)
    with pytest.raises(SmeltError, match=r"'attention0' .*a quantized cache belongs to a run"):
        capture(path)
