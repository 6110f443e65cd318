"""onnx's own convolutional nets, their weights left out: what the package expects of them is what the Program gives."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.runner import Runner

from .backend_cases import answers, difference

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
NETS = ["alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19"]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.mark.parametrize("net", [*NETS, "zfnet512"])
def test_gives_what_onnx_expects(net: str) -> None:
    path = next(p for p in FOLDER.glob("light_*.onnx") if p.stem.endswith(net))
    proto = onnx.load(path)
    meant = onnx.TensorProto.FromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = [Runner.generate_dummy_data(port) for port in proto.graph.input if port.name not in stored]
    logging.disable(logging.CRITICAL)  # torch tells every step of a trace, and pytest keeps it all
    try:
        made = answers(proto, [torch.from_numpy(value) for value in inputs], net)
    finally:
        logging.disable(logging.NOTSET)
    expected = torch.from_numpy(np.array(numpy_helper.to_array(meant)))
    assert difference(made[0], expected, 1e-3, 1e-7) is None
    assert difference(made[0] * 1.05, expected, 1e-3, 1e-7) is not None
