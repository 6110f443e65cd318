"""A small vision-language model on the classifier's tower; `python -m tests.small.vlm` trains it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from . import stored, vit
from .shapes import COLOURS, PLACES, SHAPES, Pictures, pictures
from .vit import TOKENS, WIDTH, Block, Tower

LENT = "tower"  # the part that is the classifier's
LAYERS = 2
QUESTIONS = ("which shape is it ?", "what colour is it ?", "where is it now ?")
ANSWERS = (*SHAPES, *COLOURS, *(f"place{number}" for number in range(PLACES)))
WORDS = (*dict.fromkeys(" ".join(QUESTIONS).split()), *ANSWERS)
MOST = 8  # words of a question, all of which have 5


class Vlm(nn.Module):
    """A tower and a projector give what stands in front of a causal language model's words."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.project1, self.project2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS + MOST, WIDTH))
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(WORDS))

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels [B, 3, 32, 32] and tokens int64 [B, T] → logits [B, T, V] of the next words."""
        seen = self.project2(functional.gelu(self.project1(self.tower(pixels))))
        x = torch.cat([seen, self.words(tokens)], 1)
        x = x + functional.embedding(torch.arange(x.shape[1]), self.places)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x[:, seen.shape[1] :]))}


def questions(seen: Pictures, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A question about each picture, and the words that follow each of its own: int64 [N, 5] both, the answer last."""
    random = torch.Generator().manual_seed(seed)
    asked = torch.randint(0, len(QUESTIONS), (len(seen.pixels),), generator=random)
    tokens = torch.tensor([[WORDS.index(word) for word in line.split()] for line in QUESTIONS])[asked]
    starts = torch.tensor([0, len(SHAPES), len(SHAPES) + len(COLOURS)]) + WORDS.index(ANSWERS[0])
    found = torch.stack([seen.shape, seen.colour, seen.place], 1).gather(1, asked[:, None])[:, 0]
    answer = starts[asked] + found
    return tokens, torch.cat([tokens[:, 1:], answer[:, None]], 1)


def trained() -> Vlm:
    """With the tower of the classifier and the weights beside this file, in float32."""
    return stored.load(_begun(), __file__, LENT)


def _begun() -> Vlm:
    """With the tower of the classifier, which learns no more."""
    model = Vlm()
    model.tower = vit.trained().tower.requires_grad_(False)
    return model


def right(logits: torch.Tensor, follows: torch.Tensor) -> float:
    """The share of questions that were answered."""
    return float((logits[:, -1].argmax(-1) == follows[:, -1]).float().mean())


def main(steps: int = 700, batch: int = 64) -> None:
    """Train for minutes on one core, and store the weights."""

    def loss(model: Vlm, step: int) -> torch.Tensor:
        seen = pictures(batch, 1000 + step)
        tokens, follows = questions(seen, 1000 + step)
        return functional.cross_entropy(model(seen.pixels, tokens)["logits"].flatten(0, 1), follows.flatten())

    stored.store(stored.train(_begun, loss, steps, 3e-3), __file__, LENT)
    asked = pictures(1000, 1)
    tokens, follows = questions(asked, 1)
    with torch.no_grad():
        print("right:", right(trained()(asked.pixels, tokens)["logits"], follows))


if __name__ == "__main__":
    main()
