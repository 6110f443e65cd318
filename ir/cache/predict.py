"""Keys and values of a layer foretold from the layer before, so that only what the forecast misses is stored.

AQUA-KV: Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models (2025, arXiv 2501.19392):
un-rotated keys from the keys of the previous layer, values from the layer's own keys and the previous layer's values,
by linear maps over all heads together. Both sides see what was stored, so that errors do not add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..encoding import Parts
from ..errors import SmeltError

if TYPE_CHECKING:
    from .body import Body


def merged(x: torch.Tensor) -> torch.Tensor:
    """Heads side by side: [G, n, D] → [n, G · D]."""
    return x.transpose(0, 1).flatten(1)


def foretold(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[G, n, D] from x [n, K] by a map weight [K + 1, G · D], whose last row is a constant."""
    weight = weight.float()
    out: torch.Tensor = (x.float() @ weight[:-1] + weight[-1]).unflatten(1, (heads, -1))
    return out.transpose(0, 1)


@dataclass(frozen=True)
class Forecast:
    """The maps of a layer: `keys` [G · D + 1, G · D], `values` [G · D + G · E + 1, G · E]; constants stand last."""

    previous: Body
    maps: Parts

    def __post_init__(self) -> None:
        if missing := {"keys", "values"} - self.maps.keys():
            raise SmeltError(f"a forecast of the cache lacks its map of {sorted(missing)[0]}: run cache.predict again")

    def of_keys(self, before: torch.Tensor) -> torch.Tensor:
        """Keys [G, n, D] from those of the previous layer."""
        return foretold(merged(before), self.maps["keys"], before.shape[0])

    def of_values(self, keys: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Values [G, n, E] from the layer's own keys and the previous layer's values."""
        return foretold(torch.cat([merged(keys), merged(before)], 1), self.maps["values"], keys.shape[0])


def fitted(x: torch.Tensor, y: torch.Tensor, damp: float) -> torch.Tensor:
    """Ridge regression: the map [K + 1, N] from x [n, K] and a constant to y [n, N], by normal equations in float64.

    `damp`: of the diagonal, relative to its mean; the constant is not damped.
    """
    wide = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    gram = wide.T @ wide
    ridge = damp * gram.diagonal()[:-1].mean()
    gram.diagonal()[:-1] += ridge
    found: torch.Tensor = torch.linalg.solve(gram, wide.T @ y.double())
    return found.float()
