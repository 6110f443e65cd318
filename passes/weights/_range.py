"""The step and the zero of a group of weights: what the integer codes of `Affine` are counted in.

`absmax` spans every weight of a group. Symmetric codes reach one step further down than up, so the largest weight is
the lowest code, by a negative scale where that weight is positive. `mse` shrinks that span to where the error is least,
by the search of GPTQ's authors (error to the power 2.4); `hqq` moves the zero by half-quadratic splitting (Badri and
Shaji, Half-Quadratic Quantization, 2023: p = 0.7, 20 rounds), for errors with few large parts. For ternary codes, three
of the four of 2 bits, the step can be the `mean` or the `median` magnitude (BitNet b1.58, Ma et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...ir.encoding import Affine, packing
from ...ir.encoding.base import stored_as
from ...ir.errors import SmeltError
from ...ir.weight import Weight

Range = Literal["absmax", "mse", "hqq", "mean", "median"]

POWER, SHRINKS, LEAST = 2.4, 100, 0.2  # spans from 1 down to LEAST, in steps of 1 / SHRINKS
NORM, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20
PIECE = 1 << 22  # weights that are fitted at once


@dataclass(frozen=True)
class Steps:
    """What codes count in groups [..., g]: scales and zeros [..., 1] as stored; no zero for symmetric codes.

    even: symmetric codes leave out the lowest one, so that there are three of 2 bits.
    """

    encoding: Affine
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    even: bool = False

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest codes uint8, like x."""
        base = x if self.zero is None else x - self.zero.float()
        found = (base / torch.where(self.scale == 0, 1.0, self.scale.float())).round()
        half: int = 2 ** (self.encoding.width - 1)
        low, high, offset = (self.even - half, half - 1, half) if self.zero is None else (0, 2 * half - 1, 0)
        return (found.clamp_(low, high) + offset).to(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, float32."""
        half: int = 2 ** (self.encoding.width - 1)
        if self.zero is None:
            return (codes.float() - half) * self.scale.float()
        return codes.float() * self.scale.float() + self.zero.float()

    def error(self, x: torch.Tensor, power: float) -> torch.Tensor:
        """Σ |x - x̂|^power of each group, [..., 1]."""
        return (self.values(self.codes(x)) - x).abs().clamp_min_(1e-8).pow_(power).sum(-1, keepdim=True)

    def where(self, better: torch.Tensor, other: Steps) -> Steps:
        """These where `better` [..., 1], else the other's."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = torch.where(better, self.zero, other.zero)
        return replace(self, scale=torch.where(better, self.scale, other.scale), zero=zero)


def check(rule: Range, bits: int, zero: bool) -> None:
    """Refuse a rule for codes that it does not fit."""
    if rule == "hqq" and not zero:
        raise SmeltError("range: hqq moves zeros, and there are none: say zero: true")
    if rule in ("mean", "median") and (bits != 2 or zero):
        raise SmeltError(f"range: {rule} is for ternary codes: say bits: 2 and zero: false")


def fit(x: torch.Tensor, encoding: Affine, rule: Range) -> Steps:
    """The steps of groups x float32 [..., g]."""
    rows = x.reshape(-1, x.shape[-1])
    made = [_fit(piece, encoding, rule) for piece in rows.split(max(1, PIECE // x.shape[-1]))]
    shape = (*x.shape[:-1], 1)
    zeros = [steps.zero for steps in made if steps.zero is not None]
    scale = torch.cat([steps.scale for steps in made]).view(shape)
    return Steps(encoding, scale, torch.cat(zeros).view(shape) if zeros else None)


def is_even(weight: Weight) -> bool:
    """Whether a matrix of symmetric codes is without the lowest one."""
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    return not encoding.zero and bool(packing.unpack(weight.parts, encoding.width, weight.shape[-1]).all())


def encode(weight: torch.Tensor, encoding: Affine, rule: Range) -> dict[str, torch.Tensor]:
    """The parts of a matrix [..., N, K], each weight rounded to the nearest code."""
    group = encoding.group or weight.shape[-1]
    pieces = weight.reshape(-1, group).split(max(1, PIECE // group))
    made = [(_fit(piece.float(), encoding, rule), piece) for piece in pieces]
    codes = torch.cat([steps.codes(piece.float()) for steps, piece in made])
    scale = torch.cat([steps.scale for steps, _ in made])
    zeros = [steps.zero for steps, _ in made if steps.zero is not None]
    shape = (*weight.shape[:-1], -1)
    return encoding.parts(codes.view(weight.shape), scale.view(shape), torch.cat(zeros).view(shape) if zeros else None)


def clipped(weight: torch.Tensor, encoding: Affine, share: float) -> dict[str, torch.Tensor]:
    """The parts of a matrix [..., N, K], rounded over this share of its groups' spans."""
    groups = weight.float().unflatten(-1, (-1, encoding.group or weight.shape[-1]))
    steps = _span(groups, encoding, share)
    zero = None if steps.zero is None else steps.zero.squeeze(-1)
    return encoding.parts(steps.codes(groups).reshape(weight.shape), steps.scale.squeeze(-1), zero)


def _fit(x: torch.Tensor, encoding: Affine, rule: Range) -> Steps:
    best = _span(x, encoding, 1.0)
    if rule == "hqq":
        return _split(x, best)
    if rule == "absmax":
        return best
    if rule in ("mean", "median"):
        size = x.abs()
        step = size.mean(-1, keepdim=True) if rule == "mean" else size.median(-1, keepdim=True).values
        return Steps(encoding, stored_as(encoding, step, "scale", encoding.scale), even=True)
    error = best.error(x, POWER)
    for i in range(1, int(SHRINKS * (1 - LEAST)) + 1):
        tried = _span(x, encoding, 1 - i / SHRINKS)
        found = tried.error(x, POWER)
        best = tried.where(found < error, best)
        error = torch.minimum(found, error)
    return best


def _span(x: torch.Tensor, encoding: Affine, share: float) -> Steps:
    """Steps over this share of the groups' spans."""
    if not encoding.zero:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        size = encoding.step(torch.maximum(high, -low) * share, 2 ** (encoding.width - 1))
        return Steps(encoding, torch.where(-low >= high, size, -size))
    low, high = x.amin(-1, keepdim=True) * share, x.amax(-1, keepdim=True) * share
    zero = stored_as(encoding, low, "zero", encoding.scale)
    return Steps(encoding, encoding.step((high - zero.float()).clamp_min(0), 2**encoding.width - 1), zero)


def _split(x: torch.Tensor, steps: Steps) -> Steps:
    """Zeros that leave an error with few large parts."""
    best, error = steps, steps.error(x, NORM)
    for i in range(ROUNDS):
        held = steps.codes(x)
        rest = x - steps.values(held)
        shrunk = rest.abs() - rest.abs().clamp_min(1e-8).pow_(NORM - 1) / (BETA * GROWTH**i)
        few = rest.sign() * shrunk.clamp_min_(0)
        moved = (x - few - held.float() * steps.scale.float()).mean(-1, keepdim=True)
        steps = replace(steps, zero=stored_as(steps.encoding, moved, "zero", steps.encoding.scale))
        found = steps.error(x, NORM)
        best = steps.where(found < error, best)
        error = torch.minimum(found, error)
    return best
