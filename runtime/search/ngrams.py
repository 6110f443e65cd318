"""How often tokens follow others in counted text: n-grams of every length, each under the one that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class Ngrams:
    """Reads `ngrams.1.keys`, `ngrams.1.total`, … as `passes/sample/superposed.py` counts them."""

    def __init__(self, tables: Mapping[str, torch.Tensor], vocabulary: int, longest: int) -> None:
        """`longest`: the tokens of the longest n-gram."""
        self._vocabulary = vocabulary
        self._levels = [(tables[f"ngrams.{n}.keys"], tables[f"ngrams.{n}.total"]) for n in range(1, longest + 1)]

    def shares(self, text: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        """Of what follows the last 1, 2, … tokens of a text, the share of each of `tokens` int64 [M]; float64 [L, M].

        Zero where the text's end was never followed by anything.
        """
        out = torch.zeros(len(self._levels) - 1, len(tokens), dtype=torch.float64)
        for length in range(1, min(len(text) + 1, len(self._levels))):
            parent = self._find(text[-length:])
            if parent is None:
                break  # nor was a longer one
            keys, total = self._levels[length]
            first, end = torch.searchsorted(keys, torch.tensor([parent, parent + 1]) * self._vocabulary).tolist()
            wanted = parent * self._vocabulary + tokens
            at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            counts = (total[at + 1] - total[at]) * (keys[at] == wanted)
            out[length - 1] = counts.double() / max(1, int(total[end] - total[first]))
        return out

    def _find(self, text: Sequence[int]) -> int | None:
        """The number of an n-gram among those of its length."""
        at = 0
        for (keys, _), token in zip(self._levels, text, strict=False):
            wanted = at * self._vocabulary + token
            at = int(torch.searchsorted(keys, wanted))
            if at == len(keys) or int(keys[at]) != wanted:
                return None
        return at
