"""A small convolutional net that names the shape and colour in a picture; `python -m tests.small.conv` trains it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from . import stored
from .shapes import COLOURS, SHAPES, pictures


class Conv(nn.Module):
    """A stem of three convolutions, of which the last two halve the picture, then two more, and a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 16, 1), (16, 16, 2), (16, 32, 2), (32, 32, 1), (32, 64, 2))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, by, 1, bias=False) for a, b, by in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in sizes)
        self.head = nn.Linear(64, len(SHAPES) * len(COLOURS))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels [B, 3, 32, 32] → logits [B, 24], of a kind as in `Pictures`."""
        x = pixels
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.relu(norm(convolution(x)))
        return {"logits": self.head(x.mean((2, 3)))}


def trained() -> Conv:
    """With the weights beside this file, in float32."""
    return stored.load(Conv(), __file__)


def main(steps: int = 500, batch: int = 48) -> None:
    """Train for a minute or two on one core, and store the weights."""

    def loss(model: Conv, step: int) -> torch.Tensor:
        seen = pictures(batch, 1000 + step)
        return functional.cross_entropy(model(seen.pixels)["logits"], seen.kind)

    stored.store(stored.train(Conv, loss, steps, 1e-2, clip=math.inf), __file__)


if __name__ == "__main__":
    main()
