"""Gates that learn how much noise they bear (variational information bottleneck, Dai et al. 2018, arXiv:1802.10399).

A gate is z = μ + σ ε with ε ~ N(0, 1), drawn for every window of text. One with σ ≫ μ passes nothing on that the rest
of the model could use: its unit can leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..tune._whole import Whole
from ._gates import Place
from ._size import Size, chosen, slices

QUIET = -4.0  # log σ² at first: from -9, as in the paper, hundreds of updates hear nothing but their own noise
PACE = 10.0  # how much faster log σ² learns than μ
PRICE = 3.0  # how much faster the price of size rises
STIFF = 10.0  # weight of the squared share that is missing to the limit, in nats


class Drawn(Mapping[str, torch.Tensor]):
    """The part of a dense weight that is drawn anew for every update, float32 [B, 1, K].

    dims: of what it is multiplied with; where that is not [B, T, K], all windows have the draw of the first, [K].
    """

    def __init__(self, dims: int) -> None:
        self.dims = dims
        self.value = torch.ones(1)

    def draw(self, gates: torch.Tensor) -> None:
        """Be these from now on, [B, K] or [K]."""
        self.value = gates.view(-1, 1, gates.shape[-1]) if self.dims == 3 else gates.view(-1, gates.shape[-1])[0]

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.value

    def __iter__(self) -> Iterator[str]:
        yield "data"

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Gates:
    """A `Learner` of the gates at some places of a program, each drawn into its weight there.

    limit: the size to reach. multiple: of channels that stay at a place. information: weight of ½ log(1 + μ²/σ²).
    The held-out loss is that of the units that would stay. `mean` and `noise` [N] are μ and log σ² / PACE, `price` [1]
    the multiplier of the share that is missing to the limit, which rises while it does.
    """

    whole: Whole
    places: Sequence[Place]
    drawn: Sequence[Drawn]
    size: Size
    limit: float
    multiple: int
    information: float
    leaves: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        whole: Whole,
        places: Sequence[Place],
        drawn: Sequence[Drawn],
        size: Size,
        limit: float,
        multiple: int,
        information: float,
    ) -> Gates:
        """Of gates that are open."""
        count = slices(places)[-1].stop
        made = {"mean": torch.ones(count), "noise": torch.full((count,), QUIET / PACE), "price": torch.zeros(1)}
        leaves = {name: value.requires_grad_() for name, value in made.items()}
        return cls(whole, places, drawn, size, limit, multiple, information, leaves)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The leaves."""
        return self.leaves

    @property
    def mean(self) -> torch.Tensor:
        """μ of each gate, [N]."""
        return self.leaves["mean"]

    @property
    def worth(self) -> torch.Tensor:
        """log μ²/σ² of each gate, [N]."""
        return self.mean.square().clamp_min(1e-12).log() - PACE * self.leaves["noise"]

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The model's under its noise, and what the gates let pass and cost."""
        noise = torch.randn(len(windows), len(self.mean), generator=chance)
        self._draw(self.mean + (PACE * self.leaves["noise"] / 2).exp() * noise)
        passed = self.information * functional.softplus(self.worth).sum() / 2
        missing = (self.size(self.worth.sigmoid()).float() - self.limit) / self.size.full
        price = PRICE * self.leaves["price"]
        cost = price.detach() * missing - price * missing.detach() + STIFF * missing.square()
        return self.whole.loss(windows, chance) + passed + cost.sum()

    @torch.no_grad()
    def check(self) -> float:
        """The model's loss once the units have left."""
        self._draw(self.kept() * self.mean)
        return self.whole.check()

    def kept(self) -> torch.Tensor:
        """The units that stay, bool [N]."""
        return chosen(self.places, self.size, self.worth.detach(), self.limit, self.multiple)

    def _draw(self, gates: torch.Tensor) -> None:
        """Multiply by these gates, [..., N], from now on."""
        for place, units, drawn in zip(self.places, slices(self.places), self.drawn, strict=True):
            drawn.draw(gates[..., units][..., place.index])
