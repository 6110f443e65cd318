"""Constructs that exporters write out in arithmetic: each is raised to what it means, near misses stay as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from smelt.ir.ops import ATTENTION, LAYER_NORM, RMS_NORM, ROTARY, arguments
from smelt.ir.raising.rotary_halves import frequencies

from .test_patterns import AT, INV, K, W, X, normal, raised, targets

aten = torch.ops.aten
Q, KEY, VALUE = normal(2, 4, 5, 8), normal(2, 2, 5, 8) * 0.7, normal(2, 2, 5, 8) + 0.1
ALL = normal(2, 4, 5, 8) * 0.7
SEEN = torch.ones(5, 5).tril().bool()


def test_a_norm_by_division() -> None:
    program = raised(lambda w, x: w["g"] * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)), X, g=W)
    assert targets(program) == {RMS_NORM.target}


def test_a_norm_by_the_reciprocal_of_a_root() -> None:
    program = raised(
        lambda w, x: w["g"] * (x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))), X, g=W
    )
    assert targets(program) == {RMS_NORM.target}


def layer_norm(w: Any, x: torch.Tensor, power: int = 2) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(power).mean(-1, keepdim=True) + 1e-5) * w["g"] + w["b"]


def test_a_layer_norm_in_arithmetic() -> None:
    program = raised(layer_norm, X, g=W, b=normal(K, 1)[:, 0])
    assert targets(program) == {LAYER_NORM.target}
    stays = raised(lambda w, x: layer_norm(w, x, 4), X, g=W, b=normal(K, 1)[:, 0])
    assert not list(stays.calls(LAYER_NORM))


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda w, x: x * torch.sigmoid(x), aten.silu.default),
        (lambda w, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2))), aten.gelu.default),
        (lambda w, x: (x * (torch.erf(x * math.sqrt(0.5)) + 1.0)) * 0.5, aten.gelu.default),
    ],
)
def test_activations_in_arithmetic(function: Any, op: Any) -> None:
    assert targets(raised(function, X)) == {op}


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x * torch.sigmoid(1.7 * x),
        lambda w, x: x * 0.5 * (1.0 + torch.erf(x / 1.5)),
        lambda w, x: x * 0.4 * (1.0 + torch.erf(x / math.sqrt(2))),
    ],
)
def test_what_is_almost_an_activation_stays(function: Any) -> None:
    assert not targets(raised(function, X)) & {aten.silu.default, aten.gelu.default}


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, scale: float = 0.3, cap: float | None = None
) -> torch.Tensor:
    logits = (q @ k.transpose(2, 3)) * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    if mask is not None and mask.dtype == torch.bool:
        logits = torch.where(mask, logits, -3e38)
    elif mask is not None:
        logits = logits + mask
    return torch.softmax(logits, -1) @ v


def test_attention_in_arithmetic() -> None:
    program = raised(lambda w, q, k, v: attend(q, k, v), Q, ALL, ALL + 1)
    assert targets(program) == {ATTENTION.target}
    (node,) = program.calls(ATTENTION)
    assert arguments(node)["scale"] == pytest.approx(0.3)


@pytest.mark.parametrize("mask", [SEEN, torch.where(SEEN, 0.0, -1e9), normal(5, 5)])
def test_a_mask_stays_a_mask(mask: torch.Tensor) -> None:
    program = raised(lambda w, q, k, v, m: attend(q, k, v, m), Q, ALL, ALL + 1, mask)
    (node,) = program.calls(ATTENTION)
    assert arguments(node)["mask"] is not None and not arguments(node)["causal"]


def test_a_soft_cap_and_scales_on_both_factors() -> None:
    def function(w: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = (q * 0.5) @ (k.transpose(2, 3) * 0.25) / 0.5
        return torch.softmax(torch.tanh(logits / 3.0) * 3.0, -1) @ v

    program = raised(function, Q, ALL, ALL + 1)
    assert targets(program) == {ATTENTION.target}
    (node,) = program.calls(ATTENTION)
    assert (arguments(node)["scale"], arguments(node)["softcap"]) == (pytest.approx(0.25), 3.0)


def test_keys_turned_through_flat_batches() -> None:
    """As exporters transpose the last two dimensions."""

    def function(w: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = k.reshape(-1, 5, 8).transpose(1, 2).reshape(2, 4, 8, 5)
        return torch.softmax(q @ turned, -1) @ v

    program = raised(function, Q, ALL, ALL + 1)
    assert targets(program) == {ATTENTION.target}


def test_repeated_heads_are_shared() -> None:
    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(2).expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8)

    program = raised(lambda w, q, k, v: attend(q, spread(k), spread(v)), Q, KEY, VALUE)
    assert targets(program) == {ATTENTION.target}
    other = raised(lambda w, q, k, v: attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), Q, KEY, VALUE)
    (node,) = other.calls(ATTENTION)
    assert arguments(node)["key"].meta["val"].shape[1] == 4, "heads in another order are not groups"


@pytest.mark.parametrize(
    "function",
    [
        lambda w, q, k, v: torch.softmax(q @ k.transpose(2, 3), 2) @ v,
        lambda w, q, k, v: torch.softmax((q @ k.transpose(2, 3) + 1.0) * 2.0, -1) @ v,
        lambda w, q, k, v: torch.softmax(torch.where(q[..., :5] > 0, q @ k.transpose(2, 3), 0.0), -1) @ v,
        lambda w, q, k, v: (
            v @ torch.softmax(q @ k.transpose(2, 3), -1).transpose(2, 3)[..., :5].repeat(1, 1, 2, 1)[:, :, :8]
        ),
    ],
    ids=["another dimension", "scaled behind a sum", "hidden with nought", "as the right factor"],
)
def test_what_is_almost_attention_stays(function: Any) -> None:
    assert not list(raised(function, Q, ALL, ALL + 1).calls(ATTENTION))


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    r = cos.shape[-1]
    a, b, cos, sin = x[..., :r], x[..., r : 2 * r], cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *([x[..., 2 * r :]] if x.shape[-1] > 2 * r else [])], -1)


ANGLES = torch.arange(64)[:, None] * INV


@pytest.mark.parametrize("width", [8, 12])
def test_rotation_by_halves_with_tables(width: int) -> None:
    """Tables as onnxruntime's ops take them; what is behind the rotated dims passes."""

    def function(w: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return halves(x, F.embedding(at, w["cos"]), F.embedding(at, w["sin"]))

    x = normal(2, 2, 3, 8) if width == 8 else normal(2, 2, 3, 12)
    program = raised(function, x, AT, cos=ANGLES.cos() * 1.2, sin=ANGLES.sin() * 1.2)
    assert targets(program) == {ROTARY.target}
    (node,) = program.calls(ROTARY)
    assert torch.equal(program.weights[str(arguments(node)["inv_freq"].target)].dense(), INV)
    assert arguments(node)["scale"] == pytest.approx(1.2)


def test_rotation_by_halves_with_computed_waves() -> None:
    def function(w: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angles = at.unsqueeze(2).float() * w["inv"]
        return halves(x, angles.cos(), angles.sin())

    assert targets(raised(function, normal(2, 2, 3, 8), AT, inv=INV)) == {ROTARY.target}


def test_tables_of_something_else_stay() -> None:
    def function(w: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return halves(x, F.embedding(at, w["cos"]), F.embedding(at, w["sin"]))

    bent = ANGLES * (1 + ANGLES / 50)
    assert not list(raised(function, normal(2, 2, 3, 8), AT, cos=bent.cos(), sin=bent.sin()).calls(ROTARY))


@pytest.mark.parametrize("rows", [2, 100, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frequencies_come_out_of_tables(rows: int, dtype: torch.dtype) -> None:
    inverse = 1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64)
    angles = torch.arange(rows).float()[:, None] * inverse
    found = frequencies(angles.cos().to(dtype), angles.sin().to(dtype))
    assert found is not None and found[1] == 1.0
    precision = 1e-7 if dtype is torch.float32 else 2e-3 / rows
    assert float((found[0] - inverse).abs().max()) <= precision
