"""A small vision transformer that names shape and colour in a picture; `python -m tests.small.vit` trains it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from . import stored
from .shapes import COLOURS, SHAPES, SIZE, Pictures, pictures

WIDTH, LAYERS, HEADS, PATCH = 64, 3, 4, 8
TOKENS = 1 + (SIZE // PATCH) ** 2


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and beside the stream [B, T, WIDTH]."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stream, with both parts added."""
        y = self.norm1(x)
        q, k, v = (each(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        added: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return added


class Tower(nn.Module):
    """Pictures as states: a class token and 16 patches through blocks and a norm; [B, 3, 32, 32] → [B, 17, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patch = nn.Conv2d(3, 16, 4, 2, 1), nn.Conv2d(16, WIDTH, PATCH // 2, PATCH // 2)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """States behind the last norm."""
        x = self.patch(functional.gelu(self.stem(pixels))).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        states: torch.Tensor = self.norm(x)
        return states


class Vit(nn.Module):
    """Classifies pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.head = nn.Linear(WIDTH, len(SHAPES) * len(COLOURS))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels [B, 3, 32, 32] → logits [B, 24], of a kind as in `Pictures`."""
        return {"logits": self.head(self.tower(pixels)[:, 0])}


def trained() -> Vit:
    """With the weights beside this file, in float32."""
    return stored.load(Vit(), __file__)


def right(logits: torch.Tensor, asked: Pictures) -> float:
    """The share of pictures whose kind was named."""
    return float((logits.argmax(-1) == asked.kind).float().mean())


def main(steps: int = 1000, batch: int = 64) -> None:
    """Train for minutes on one core, and store the weights."""

    def loss(model: Vit, step: int) -> torch.Tensor:
        seen = pictures(batch, 1000 + step)
        return functional.cross_entropy(model(seen.pixels)["logits"], seen.kind, label_smoothing=0.02)

    stored.store(stored.train(Vit, loss, steps, 2e-3), __file__)
    asked = pictures(1000, 1)
    with torch.no_grad():
        print("right:", right(trained()(asked.pixels)["logits"], asked))


if __name__ == "__main__":
    main()
