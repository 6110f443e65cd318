"""Every channel divided by the root of its greatest magnitude before another encoding: channel-separable tokens.

ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification (2024, arXiv 2405.14256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from .base import Encoding, Parts, checked, stored_as
from .expr import Bin, Expr, k, number, renamed


@dataclass(frozen=True)
class ChannelScaled(Encoding):
    """`x = inner * channel`, with channel k = √max_n |x[n, k]| of each matrix of `[..., N, K]`.

    Outlier channels then widen the range of a row by the root of what they did: one scale a row (`inner` by token) does
    with little more error than one a group. Deviation: the paper's rows run over all heads of a layer, here a head is a
    matrix of its own, so that heads can be read alone.

    Parts: `channel` float16 `[..., 1, K]`, those of `inner` with `a_` before their names.
    """

    name: ClassVar[str] = "channel_scaled"
    inner: Encoding

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Encoding):
            example = "{affine: {bits: 4, group: 0, zero: true}}"
            raise SmeltError(f"channel_scaled: inner is an encoding, such as {example}, not {self.inner!r}")

    @property
    def calibrated(self) -> bool:
        """As the inner encoding."""
        return self.inner.calibrated

    @property
    def closes(self) -> int:
        """The rows of a group of the inner encoding; those of a page share the channels' scales."""
        return max(2, self.inner.closes)

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tables of the inner encoding for scaled channels."""
        x = checked(self, x)
        return {
            f"a_{part}": value for part, value in self.inner.fit(x / self._divisor(self._channel(x)), weight).items()
        }

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The channels' scales, and the inner parts of what is left."""
        x = checked(self, x)
        channel, own = self._channel(x), _inner(tables or {})
        made = self.inner.encode(x / self._divisor(channel), own or None)
        return {"channel": channel, **{f"a_{part}": value for part, value in made.items()}}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The inner value times its channel's scale, in float32, then `dtype`."""
        return (self.inner.decode(_inner(parts), shape) * parts["channel"].float()).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """The inner parts and a scale a channel."""
        return sympy.expand(self.inner.stored_bits(shape) + 16 * sympy.prod(shape[:-2]) * shape[-1])

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of the inner encoding."""
        return self.inner.table_bits(shape)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The inner expression times `channel[k]`."""
        return Bin("mul", renamed(self.inner.expr(shape), "a_"), number("channel", k, "float16"))

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """What the inner encoding refuses."""
        return self.inner.refuses(shape)

    def _channel(self, x: torch.Tensor) -> torch.Tensor:
        return stored_as(self, x.abs().amax(-2, keepdim=True).sqrt(), "channel scale", "float16")

    @staticmethod
    def _divisor(channel: torch.Tensor) -> torch.Tensor:
        return torch.where(channel == 0, 1.0, channel.float())


def _inner(parts: Parts) -> dict[str, torch.Tensor]:
    return {name.removeprefix("a_"): part for name, part in parts.items() if name.startswith("a_")}
