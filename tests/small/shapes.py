"""Small pictures of one coloured shape each on noise, and what is in them: made from a seed, in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SIZE = 32  # pixels a side
SHAPES = ("square", "triangle", "cross", "ring")
COLOURS = {
    "red": (0.9, 0.2, 0.2),
    "green": (0.2, 0.8, 0.2),
    "blue": (0.2, 0.3, 0.9),
    "yellow": (0.9, 0.8, 0.2),
    "purple": (0.7, 0.2, 0.8),
    "cyan": (0.2, 0.8, 0.8),
}
PLACES = 9  # in three rows of three


@dataclass(frozen=True)
class Pictures:
    """N pictures float32 [N, 3, 32, 32] of mean about 0, and the numbers of their shapes, colours and places."""

    pixels: torch.Tensor
    shape: torch.Tensor
    colour: torch.Tensor
    place: torch.Tensor

    @property
    def kind(self) -> torch.Tensor:
        """Shape and colour as one of 24 classes."""
        return self.shape * len(COLOURS) + self.colour


def pictures(count: int, seed: int) -> Pictures:
    """So many, of every kind about as often."""
    random = torch.Generator().manual_seed(seed)
    shape, colour, place = (
        torch.randint(0, limit, (count,), generator=random) for limit in (len(SHAPES), len(COLOURS), PLACES)
    )
    cell = torch.stack([place % 3, place // 3], 1)
    centre = 6.5 + 9.5 * cell + 3 * torch.rand(count, 2, generator=random) - 1.5
    radius = 5.0 + 1.0 * torch.rand(count, 1, 1, generator=random)
    at = torch.arange(SIZE)
    x = (at - centre[:, :1])[:, None, :] / radius
    y = (at - centre[:, 1:])[:, :, None] / radius
    drawn = torch.stack(_masks(x, y), 1)[torch.arange(count), shape].float()[:, None]
    paint = torch.tensor(list(COLOURS.values()))[colour] + 0.08 * torch.randn(count, 3, generator=random)
    ground = 0.5 + 0.15 * torch.randn(count, 3, generator=random)
    pixels = drawn * paint[:, :, None, None] + (1 - drawn) * ground[:, :, None, None]
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=random)
    return Pictures((pixels - 0.5) / 0.25, shape, colour, place)


def _masks(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Where each shape is, bool [N, 32, 32], for distances from its middle in radii."""
    far, wide, tall = (x.square() + y.square()).sqrt(), x.abs(), y.abs()
    inside = torch.maximum(wide, tall) <= 1
    return [
        torch.maximum(wide, tall) <= 0.85,
        (tall <= 0.95) & (wide <= (y + 0.95) / 1.9),
        inside & (torch.minimum(wide, tall) <= 0.33),
        (far <= 1.1) & (far >= 0.55),
    ]
