"""Small models that are trained once: how, and how their weights stand in float16 beside the file that defines them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
TOLD = 100  # updates between two losses that are printed


def path(file: str) -> Path:
    """Where the weights of the model stand that `file` defines."""
    return Path(file).with_suffix(".safetensors")


def own(model: nn.Module, lent: str | None = None) -> dict[str, torch.Tensor]:
    """What is stored of a model: no counters, and nothing of the part `lent`, which is another model's."""
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    return {name: value for name, value in state.items() if lent is None or not name.startswith(f"{lent}.")}


def load(model: Model, file: str, lent: str | None = None) -> Model:
    """The model with its stored weights, float32, for use alone. KeyError where they are those of another model."""
    held = load_file(path(file))
    if differing := held.keys() ^ own(model, lent).keys():
        raise KeyError(f"{path(file).name} is not of this model, by {min(differing)}: train it anew")
    model.load_state_dict({name: value.float() for name, value in held.items()}, strict=False)
    return model.eval()


def store(model: nn.Module, file: str, lent: str | None = None) -> None:
    """Write the weights in float16."""
    save_file({name: value.half().contiguous() for name, value in own(model, lent).items()}, path(file))


def train(
    make: Callable[[], Model],
    loss: Callable[[Model, int], torch.Tensor],
    steps: int,
    rate: float,
    decay: float = 0.02,
    clip: float = 1.0,
) -> Model:
    """A model after `steps` updates by AdamW in one cycle of rates; `loss` takes the number of the update.

    From seed 0 on one thread, whatever the process has: sums are then the same each time, so that on one machine with
    one version of PyTorch the weights come out bit for bit. On others they differ by rounding, which training grows.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = make()
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, rate, weight_decay=decay)
        rates, lost = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps), 0.0
        for step in range(steps):
            found = loss(model, step)
            optimizer.zero_grad()
            found.backward()
            nn.utils.clip_grad_norm_(learned, clip)
            optimizer.step()
            rates.step()
            lost += found.item()
            if step % TOLD == TOLD - 1:
                print(step + 1, round(lost / TOLD, 4), flush=True)
                lost = 0.0
        return model
    finally:
        torch.set_num_threads(threads)
