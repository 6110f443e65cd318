"""Chains of tokens behind what each row's cache holds, as one step in which no chain sees another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..trees import padded


class Forest:
    """`chains[row]` are the row's chains; a row may have none. `tokens`, `depths` int64 and `real` bool are [B, N]."""

    def __init__(self, chains: Sequence[Sequence[Sequence[int]]]) -> None:
        width = padded(max(sum(map(len, row)) for row in chains))
        self.tokens = torch.zeros(len(chains), width, dtype=torch.int64)
        self.depths = torch.zeros(len(chains), width, dtype=torch.int64)
        self.real = torch.zeros(len(chains), width, dtype=torch.bool)
        seen = torch.eye(width, dtype=torch.bool).repeat(len(chains), 1, 1)
        self.nodes: list[list[range]] = []
        """The nodes of each row's chains."""
        for row, held in enumerate(chains):
            self.nodes.append([])
            end = 0
            for chain in held:
                start, end = end, end + len(chain)
                self.tokens[row, start:end] = torch.tensor(chain, dtype=torch.int64)
                self.depths[row, start:end] = torch.arange(len(chain))
                self.real[row, start:end] = True
                seen[row, start:end, start:end] = torch.ones(len(chain), len(chain), dtype=torch.bool).tril()
                self.nodes[row].append(range(start, end))
        self.ancestors = seen if width > 1 else None

    def ends(self, row: int) -> list[int]:
        """The last node of each of the row's chains."""
        return [nodes[-1] for nodes in self.nodes[row]]

    def paths(self, kept: Mapping[int, tuple[int, int]]) -> list[list[int]]:
        """What to commit: of each row `kept[row]`, a chain and how many of its tokens; nothing of other rows."""
        out: list[list[int]] = [[] for _ in self.nodes]
        for row, (chain, count) in kept.items():
            out[row] = list(self.nodes[row][chain])[:count]
        return out
