"""A small text-conditional diffusion model: captions of coloured shapes, a text encoder, a UNet that denoises 16 × 16.

`python -m tests.small.unet` trains it anew (about a minute on one core) and overwrites unet.safetensors.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from . import stored

COLOURS = {
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 0.9, -0.8),
    "blue": (-0.8, -0.6, 1.0),
    "yellow": (1.0, 0.9, -0.8),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("disc", "square", "cross")
PLACES = {"left": (0.0, -4.0), "right": (0.0, 4.0), "above": (-4.0, 0.0), "below": (4.0, 0.0)}
WORDS = ("", "a", "of", "and", *COLOURS, *SHAPES, *PLACES)
LENGTH, ROOM, SIZE, STEPS, WIDTH = 6, 16, 16, 100, 32  # captions are LENGTH words; there are places for ROOM


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float32 [N, 3, 16, 16] in -1 … 1, and their captions as word numbers int64 [N, LENGTH]."""
    random = torch.Generator().manual_seed(seed)

    def draw(options: int) -> int:
        return int(torch.randint(0, options, (), generator=random))

    images, captions = torch.full((count, 3, SIZE, SIZE), -1.0), torch.zeros(count, LENGTH, dtype=torch.int64)
    for image, caption in zip(images, captions, strict=True):
        things = [(list(COLOURS)[draw(len(COLOURS))], SHAPES[draw(len(SHAPES))]) for _ in range(2)]
        kind, place = draw(4), list(PLACES)[draw(len(PLACES))]
        words = ["a", *things[0]]
        if kind:
            words = [*things[0], place, *(["of"] if place in ("left", "right") else []), *things[1]]
            if kind == 1:
                words = [*things[0], "and", *things[1]]
            dy, dx = PLACES[place]
            _paint(image, *things[1], 7.5 - dy, 7.5 - dx)
            _paint(image, *things[0], 7.5 + dy, 7.5 + dx)
        else:
            _paint(image, *things[0], 7.5, 7.5)
        caption[: len(words)] = torch.tensor([WORDS.index(word) for word in words])
    return images, captions


def _paint(image: torch.Tensor, colour: str, shape: str, y: float, x: float) -> None:
    """One shape of about 6 pixels around a place."""
    rows, columns = torch.arange(SIZE)[:, None] - y, torch.arange(SIZE) - x
    inside = {
        "disc": rows**2 + columns**2 <= 10,
        "square": (rows.abs() <= 2.6) & (columns.abs() <= 2.6),
        "cross": (rows.abs() <= 3.1) & (columns.abs() <= 3.1) & ((rows.abs() < 1) | (columns.abs() < 1)),
    }[shape]
    image[:, inside] = torch.tensor(COLOURS[colour])[:, None]


def kept(step: torch.Tensor) -> torch.Tensor:
    """How much of the image is left at a step 0 … STEPS - 1, by the cosine schedule; [B] → [B]."""
    return torch.cos((step.float() + 1) / (STEPS + 1) * math.pi / 2) ** 2


def noisy(images: torch.Tensor, step: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Images with as much noise as a step has."""
    left = kept(step)[:, None, None, None]
    return left.sqrt() * images + (1 - left).sqrt() * noise


class Attention(nn.Module):
    """Queries of one sequence over another; two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (self.q(x), self.k(other), self.v(other)))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a feed-forward part, each behind a norm and around the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Text(nn.Module):
    """Captions int64 [B, T] to what the UNet reads of them [B, T, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Embedding(ROOM, WIDTH)
        nn.init.normal_(self.places.weight, std=0.1)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return {"prompt": self.project(self.norm(x))}


class Convolutions(nn.Module):
    """Two convolutions around the stream, told the time between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, WIDTH), nn.GroupNorm(4, WIDTH)
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.first(functional.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return x + self.second(functional.silu(self.norm2(y)))


class Cross(nn.Module):
    """Pixels that read the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(4, WIDTH), Attention()

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        y = self.attention(self.norm(x).flatten(2).transpose(1, 2), prompt)
        return x + y.transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """The noise in images [B, 3, 16, 16] at steps float32 [B], given a prompt [B, T, WIDTH]; 8 × 8 and 4 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pace", torch.exp(torch.linspace(0, -math.log(100), WIDTH // 2)), persistent=False)
        self.time1, self.time2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.enter, self.leave = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, 12, 3, padding=1)
        self.high, self.low, self.last = Convolutions(), Convolutions(), Convolutions()
        self.down, self.up = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.cross, self.again = Cross(), Cross()
        self.norm = nn.GroupNorm(4, WIDTH)

    def forward(self, pixels: torch.Tensor, step: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        angle = step[:, None] * self.pace
        time = self.time2(functional.silu(self.time1(torch.cat([angle.sin(), angle.cos()], -1))))
        high = self.high(self.enter(pixels), time)
        x = self.cross(self.low(self.down(high), time), prompt)
        x = high + self.up(functional.interpolate(x, scale_factor=2.0))
        x = self.last(self.again(x, prompt), time)
        return functional.pixel_shuffle(self.leave(functional.silu(self.norm(x))), 2)


class Diffusion(nn.Module):
    """Both: noisy pixels, steps and captions to the noise, and to the prompt on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.unet = Text(), UNet()

    def forward(self, pixels: torch.Tensor, step: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        prompt = self.text(tokens)["prompt"]
        return {"noise": self.unet(pixels, step, prompt), "prompt": prompt}


def trained() -> Diffusion:
    """The model with the weights that stand beside this file."""
    return stored.load(Diffusion(), __file__)


def asked(count: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs for scenes at random steps, by name, the first with the null prompt; and the noise that is in them."""
    images, tokens = scenes(count, seed)
    tokens[0] = 0
    random = torch.Generator().manual_seed(seed)
    step = torch.randint(0, STEPS, (count,), generator=random)
    noise = torch.randn(images.shape, generator=random)
    return {"pixels": noisy(images, step, noise), "step": step.float(), "tokens": tokens}, noise


def main(steps: int = 1500, batch: int = 32) -> None:
    """Train to denoise, with a tenth of the captions left out so that there is a null prompt; store the weights."""
    images, captions = scenes(4096, 1)

    def loss(model: Diffusion, step: int) -> torch.Tensor:
        rows = torch.randint(0, len(images), (batch,))
        at, noise = torch.randint(0, STEPS, (batch,)), torch.randn(batch, 3, SIZE, SIZE)
        tokens = captions[rows].masked_fill(torch.rand(batch, 1) < 0.1, 0)
        return functional.mse_loss(model(noisy(images[rows], at, noise), at.float(), tokens)["noise"], noise)

    stored.store(stored.train(Diffusion, loss, steps, 3e-3, decay=1e-4), __file__)


if __name__ == "__main__":
    main()
