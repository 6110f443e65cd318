"""A small convolutional net that names the shape and colour in a picture; `python -m tests.small.conv` trains it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from .shapes import COLOURS, SHAPES, pictures

WEIGHTS = Path(__file__).with_suffix(".safetensors")


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
    model = Conv().eval()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()}, strict=False)
    return model


def main(steps: int = 500, batch: int = 48) -> None:
    """Train for a minute or two on one core, and store the weights in float16."""
    torch.manual_seed(0)
    model = Conv()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        seen = pictures(batch, 1000 + step)
        loss = functional.cross_entropy(model(seen.pixels)["logits"], seen.kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 50 == 49:
            print(step + 1, round(loss.item(), 3), flush=True)
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    save_file({name: value.half().contiguous() for name, value in state.items()}, WEIGHTS)


if __name__ == "__main__":
    main()
