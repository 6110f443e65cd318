"""A decoder of random 4-bit weights: its shape, its weights, and one step of it in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from smelt.ir.encoding import Affine
from smelt.ir.ops.rotary import rotary

EPS = 1e-5
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with gated MLPs; `stored`: tokens in its cache before the step."""

    hidden: int = 2048
    layers: int = 16
    heads: int = 32
    groups: int = 8
    dim: int = 64
    inner: int = 8192
    vocabulary: int = 128256
    stored: int = 1024
    group: int = 128

    def __str__(self) -> str:
        """For the table."""
        return f"{self.layers} layers of {self.hidden}, {self.vocabulary} words, behind {self.stored} tokens"

    @property
    def encoding(self) -> Affine:
        """Of all matrices but the embedding."""
        return Affine(4, self.group)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's products; `qkv` are the query, key and value heads below each other."""
        return {
            "qkv": ((self.heads + 2 * self.groups) * self.dim, self.hidden),
            "out": (self.hidden, self.heads * self.dim),
            "gate": (self.inner, self.hidden),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


@dataclass(frozen=True)
class Model:
    """Encoded matrices by layer, the head, gains, the embedding of the step's token, and frequencies of rotary."""

    shape: Shape
    layers: list[dict[str, Parts]]
    head: Parts
    gains: list[torch.Tensor]  # two a layer, and the last norm's
    token: torch.Tensor  # [1, hidden]
    frequencies: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, device: str, half: torch.dtype) -> Model:
        """Matrices that keep the size of what they multiply."""

        def matrix(n: int, k: int) -> Parts:
            return shape.encoding.encode(torch.randn(n, k, device=device) / k**0.5)

        layers = [{name: matrix(*size) for name, size in shape.matrices.items()} for _ in range(shape.layers)]
        gains = [(1 + 0.1 * torch.randn(shape.hidden, device=device)).to(half) for _ in range(2 * shape.layers + 1)]
        even = torch.arange(0, shape.dim, 2, device=device)
        return cls(
            shape, layers, matrix(shape.vocabulary, shape.hidden), gains,
            torch.randn(1, shape.hidden, device=device).to(half), 10000.0 ** (-even / shape.dim),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Of encoded matrices, which a step reads once."""
        every = [parts for layer in self.layers for parts in layer.values()] + [self.head]
        return sum(part.numel() * part.element_size() for parts in every for part in parts.values())

    def decoded(self, dtype: torch.dtype) -> Iterable[dict[str, torch.Tensor]]:
        """A layer's matrices at a time, the head last."""
        encoding, sizes = self.shape.encoding, self.shape.matrices
        for layer in self.layers:
            yield {name: encoding.decode(parts, sizes[name]).to(dtype) for name, parts in layer.items()}
        yield {"head": encoding.decode(self.head, (self.shape.vocabulary, self.shape.hidden)).to(dtype)}


def plain(
    model: Model,
    matrices: Iterable[Mapping[str, torch.Tensor]],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    dtype: torch.dtype,
) -> Callable[[], torch.Tensor]:
    """A step in plain torch that returns logits [1, V]; keys and values [1, G, stored + 1, D] get the token's."""
    shape = model.shape
    gains, token = [gain.to(dtype) for gain in model.gains], model.token.to(dtype)
    at = torch.full((1, 1), shape.stored, device=token.device)

    def step() -> torch.Tensor:
        x = token
        for number, w in enumerate(matrices):
            inner = functional.rms_norm(x, (shape.hidden,), gains[2 * number], EPS)
            if "head" in w:
                return functional.linear(inner, w["head"])
            joined = functional.linear(inner, w["qkv"]).view(1, 1, -1, shape.dim).transpose(1, 2)
            q, k, v = joined.split([shape.heads, shape.groups, shape.groups], 1)
            keys[number].index_copy_(2, at[0], rotary(k, at, model.frequencies))
            values[number].index_copy_(2, at[0], v)
            turned = rotary(q, at, model.frequencies)
            mixed = functional.scaled_dot_product_attention(turned, keys[number], values[number], enable_gqa=True)
            x = x + functional.linear(mixed.reshape(1, -1), w["out"])
            inner = functional.rms_norm(x, (shape.hidden,), gains[2 * number + 1], EPS)
            gated = functional.silu(functional.linear(inner, w["gate"])) * functional.linear(inner, w["up"])
            x = x + functional.linear(gated, w["down"])
        raise AssertionError("the head comes last")

    return step
