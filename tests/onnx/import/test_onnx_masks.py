"""Masks by their values, windows wider than what is looked at among them; and ops whose results no memory holds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from smelt.ir.capture.onnx.load import load
from smelt.ir.capture.onnx.masks import Changes, meanings
from smelt.ir.capture.onnx.module import OnnxModule
from smelt.ir.errors import SmeltError

from .graphs import FLOAT, graph, random, saved


def apart(length: int) -> torch.Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)


def meant(mask: Any, **numbers: float) -> Any:
    """What `mask(length, **numbers)` is taken for."""

    def look(length: int, fill: int, changes: Changes) -> Mapping[str, torch.Tensor]:
        return {"it": mask(length, **{name: changes.get(name, number) for name, number in numbers.items()})}

    places: dict[Hashable, float] = dict(numbers)
    return meanings(look, ["it"], places)["it"]


def banded(length: int, window: float, beyond: float = 0) -> torch.Tensor:
    return (apart(length) >= 0) & (apart(length) < window + beyond)


def filled(length: int, window: float, low: float) -> torch.Tensor:
    return torch.where(banded(length, window), 0.0, -abs(low))


@pytest.mark.parametrize("window", [5, 32, 200, 4097, 5000, 131072])
def test_every_width_is_found(window: int) -> None:
    assert meant(banded, window=window) == (True, window)
    assert meant(filled, window=window, low=65504) == (True, window)


def test_a_window_may_be_written_as_its_last_place() -> None:
    assert meant(lambda length, last: (apart(length) >= 0) & (apart(length) <= last), last=9999) == (True, 10000)
    assert meant(lambda length, last: (apart(length) >= 0) & (-apart(length) >= last), last=-9999) == (True, 10000)


def test_the_narrower_of_two_windows_holds() -> None:
    both = meant(lambda length, one, two: banded(length, one) & banded(length, two), one=9000, two=7000)
    assert both == (True, 7000)


def test_numbers_that_are_no_window_change_nothing() -> None:
    assert meant(lambda length, padding: (apart(length) >= 0) & (torch.tensor(7) != padding), padding=50256) == (
        True,
        None,
    )
    assert meant(filled, window=8, low=1e9) == (True, 8)


def test_what_moves_otherwise_is_refused() -> None:
    found = meant(lambda length, size: banded(length, 2 * size), size=5000)
    assert found == "depends on the number 5000 in a way that is no window"
    found = meant(lambda length, start: (apart(length) >= 0) & (torch.arange(length) < start), start=5000)
    assert found == "depends on the number 5000 in a way that is no window"


INTS: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any]]] = {
    "Tile": ("Tile", ["w", "n"], {"n": [1, 1 << 22]}, {}),
    "Expand": ("Expand", ["w", "n"], {"n": [1 << 20, 16, 128]}, {}),
    "Pad": ("Pad", ["w", "n"], {"n": [0, 0, 1 << 26, 0]}, {}),
    "Range": ("Range", ["a", "n", "b"], {"n": 1 << 30, "a": 0, "b": 1}, {}),
    "Resize": ("Resize", ["w", "", "", "n"], {"n": [1 << 15, 1 << 15]}, {"mode": "nearest"}),
    "MatMul": ("MatMul", ["u", "v"], {}, {}),
    "Add": ("Add", ["u", "v"], {}, {}),
}


@pytest.mark.parametrize("name", INTS)
def test_a_result_too_large_is_not_computed(name: str, tmp_path: Path) -> None:
    op, inputs, numbers, attributes = INTS[name]
    tensors = {"w": random(16, 128), "u": random(1 << 15, 1), "v": random(1, 1 << 15)}
    tensors |= {key: np.array(value, np.int64) for key, value in numbers.items()}
    nodes = [helper.make_node(op, inputs, ["many"], "bomb", **attributes), helper.make_node("Size", ["many"], ["y"])]
    model = graph(nodes, {"x": (FLOAT, ["batch"])}, {"y": (7, [])}, tensors)
    module = OnnxModule(load(saved(model, tmp_path)))
    module.doubting = True
    with pytest.raises(SmeltError, match=r"'bomb' .*it makes a tensor of \d+ elements"):
        module(torch.zeros(1))


def test_a_result_that_fits_is_computed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Tile", ["w", "n"], ["y"])]
    tensors = {"w": random(4, 8), "n": np.array([1, 3], np.int64)}
    module = OnnxModule(load(saved(graph(nodes, {"x": (FLOAT, ["b"])}, {"y": (FLOAT, [4, 24])}, tensors), tmp_path)))
    module.doubting = True
    assert module(torch.zeros(1))[0].shape == (4, 24)
