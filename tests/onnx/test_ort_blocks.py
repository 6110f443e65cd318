"""Codes in blocks: what MatMulNBits and GatherBlockQuantized make of them is what the encoding decodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smelt.codegen.onnx.builder import CONTRIB, IR_VERSION, OPSET, Builder, onnx_type
from smelt.codegen.onnx.ort_blocks import Blocks, block_tensors, blocks
from smelt.codegen.onnx.ort_form_linear import _two_rows
from smelt.ir.encoding import Affine, Dense
from smelt.ir.weight import Weight

onnxruntime = pytest.importorskip("onnxruntime", reason="runs small graphs in onnxruntime")
ROWS, COLUMNS = 48, 512


def weight(encoding: Affine, rows: int = ROWS, columns: int = COLUMNS) -> Weight:
    random = torch.Generator().manual_seed(rows + columns + encoding.width)
    dense = torch.randn(rows, columns, generator=random)
    return Weight((rows, columns), encoding, encoding.encode(dense))


def run(builder: Builder, **given: Any) -> Any:
    """What the builder's last node makes of inputs."""
    from onnx import helper, numpy_helper

    inputs = [helper.make_tensor_value_info(n, onnx_type(torch.from_numpy(v).dtype), v.shape) for n, v in given.items()]
    outputs = [helper.make_empty_tensor_value_info(builder.nodes[-1].output[0])]
    tensors = [helper.make_tensor(t.name, t.kind, t.dims, t.read(), raw=True) for t in builder.tensors.values()]
    assert all(numpy_helper.to_array(tensor).size for tensor in tensors)
    graph = helper.make_graph(builder.nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, given)[0]


def empty() -> Builder:
    return Builder("test", lambda builder, name: name)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_products_are_those_of_the_decoded_matrix(bits: int, group: int) -> None:
    stored, b = weight(Affine(bits, group)), empty()
    cut = blocks([stored])
    assert cut is not None
    data, scales = block_tensors(b, {"w": stored}, cut)
    options: dict[str, Any] = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": cut.block, "accuracy_level": 1}
    b.op("MatMulNBits", "x", data, scales, domain=CONTRIB, **options)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    wanted = x @ stored.dense().T
    assert (torch.from_numpy(run(b, x=x.numpy())) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lookups_are_rows_of_the_decoded_table(bits: int) -> None:
    stored, b = weight(Affine(bits, 64)), empty()
    cut = blocks([stored])
    assert cut is not None
    data, scales = block_tensors(b, {"w": stored}, cut, flat=True)
    options: dict[str, Any] = {"bits": bits, "block_size": cut.block, "gather_axis": 0, "quantize_axis": 1}
    b.op("GatherBlockQuantized", data, "ids", scales, domain=CONTRIB, **options)
    ids = np.array([[0, 7, 47]])
    assert np.abs(run(b, ids=ids) - stored.dense()[torch.from_numpy(ids)].numpy()).max() < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_two_rows_undo_the_rounding(bits: int) -> None:
    stored = weight(Affine(bits, 128))
    cut = blocks([stored])
    assert cut is not None
    x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[0, 2], x[1, :, :128] = 0, 0  # blocks whose scale is 0
    wanted, errors = x @ stored.dense().T, {}
    for rounding in (True, False):
        b = empty()
        data, scales = block_tensors(b, {"w": stored}, cut)
        options: dict[str, Any] = {"K": COLUMNS, "N": ROWS, "bits": bits, "block_size": cut.block}
        entered = "x" if rounding else _two_rows(b, "x", 3, cut)
        made = b.op("MatMulNBits", entered, data, scales, domain=CONTRIB, accuracy_level=4, **options)
        if not rounding:
            b.op("Add", *b.op("Split", made, axis=0, num_outputs=2, outputs=2))
        errors[rounding] = float((torch.from_numpy(run(b, x=x.numpy())) - wanted).norm() / wanted.norm())
    assert errors[False] < 5e-5
    assert errors[True] < 2e-2  # and where the processor has integer products it is far from exact


def test_blocks_are_the_widest_that_every_group_is_made_of() -> None:
    def cut(*groups: int, bits: int = 4, columns: int = COLUMNS) -> Blocks | None:
        return blocks([weight(Affine(bits, group), columns=columns) for group in groups])

    assert cut(0) == Blocks(4, 256, COLUMNS)
    assert cut(0, 64) == Blocks(4, 64, COLUMNS)
    assert cut(32, 64, 128) == Blocks(4, 32, COLUMNS)
    assert cut(0, bits=2) == Blocks(2, 128, COLUMNS)  # wider ones have no kernel
    assert cut(0, bits=8, columns=96) == Blocks(8, 32, 96)
    assert cut(0, bits=8, columns=100) is None


def test_other_encodings_have_no_blocks() -> None:
    four, eight = weight(Affine(4, 64)), weight(Affine(8, 64))
    assert blocks([four, eight]) is None
    assert blocks([four, weight(Affine(4, 64), columns=256)]) is None
    assert blocks([weight(Affine(4, 64, zero=True))]) is None
    assert blocks([Weight.of(torch.randn(4, 32))]) is None
    assert isinstance(Weight.of(torch.randn(4, 32)).encoding, Dense)
    assert blocks([four], most=32) == Blocks(4, 32, COLUMNS)
    assert blocks([four], most=0) is None  # activations that are rounded by whole rows
