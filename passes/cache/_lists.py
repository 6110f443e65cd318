"""How much attention layers lose that read the list of an earlier one, on sample text: which layer is to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...ir.cache import Site
from ...ir.cache.retrieve import vote
from ...ir.cache.score import probabilities, sees
from ...ir.errors import SmeltError
from ...ir.interpret import interpret
from ...ir.ops.attention import attention
from ...ir.program import Program
from ..base import Samples

WINDOW, WINDOWS = 512, 8  # tokens of a text, within what models were trained at, and how many texts are looked at
PROBES = 32  # newest queries of a text, which are asked
SHARE = 4  # a list holds the budget, or one in so many tokens of the body where that is less

Lost = Mapping[tuple[int, int], float]


@dataclass
class _Watcher:
    """Attends as a plain model does, and notes what every layer would have lost with each earlier layer's list."""

    sites: Mapping[int, Site]
    lists: dict[int, torch.Tensor] = field(default_factory=dict)
    lost: dict[tuple[int, int], float] = field(default_factory=dict)
    now: tuple[torch.Tensor, torch.Tensor] | None = None

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.now = k, v

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert self.now is not None
        if layer in self.sites:
            self._watch(self.sites[layer], q[0, :, -PROBES:], self.now[0][0], scale, window, softcap, sinks)
        return attention(q, *self.now, None, sinks, scale, True, window, softcap)

    def _watch(
        self,
        site: Site,
        q: torch.Tensor,
        k: torch.Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Of the newest queries q [H, n, D] over keys k [G, S, D]: what they lose, and the list that they make."""
        assert site.retrieve is not None
        at = torch.arange(k.shape[1])
        body = slice(site.sink, len(at) - PROBES - (site.tail or 0))  # what has left the tail for the first of them
        seen = sees(at[-PROBES:], at[None], window)
        mass = probabilities(q, k, seen, scale, softcap, sinks)[..., body].mean((0, 1))  # [n, body]
        for source, chosen in self.lists.items():
            if chosen.shape == mass.shape:  # else the bodies differ
                self.lost[source, site.layer] = float((mass * ~chosen).sum(-1).mean())
        budget = min(site.retrieve.budget, mass.shape[1] // SHARE)
        chooser = replace(site, retrieve=replace(site.retrieve, budget=budget))
        near = seen[..., body].expand(site.kv_heads, -1, -1)
        self.lists[site.layer] = vote(chooser, q, k[:, body].float(), scale, near, softcap)[0]


def lost(program: Program, sites: Sequence[Site], samples: Samples) -> Lost:
    """By (source, layer) of these sites, the mean share of its attention that a layer loses with the source's list.

    Sinks and tails are always read, and windows hide what they hide. Samples are joined to longer texts.
    """
    tokens = samples.tokens.flatten()
    length = min(WINDOW, int(program.facts.get("context") or WINDOW), len(tokens))
    always = max(site.sink + (site.tail or 0) for site in sites) + PROBES
    if length < always + SHARE:
        raise SmeltError(
            f"layers: auto compares lists on texts of {length} tokens, of which {always} are always read: "
            "give longer samples, shorten the tail, or name the layers"
        )
    texts = tokens[: len(tokens) // length * length].view(-1, length)[:WINDOWS]
    total: dict[tuple[int, int], float] = {}
    positions = torch.arange(length)[None]
    for number, text in enumerate(texts):
        samples.progress(number, len(texts), "comparing lists")
        watcher = _Watcher({site.layer: site for site in sites})
        with torch.no_grad():
            interpret(program, {"tokens": text[None], "positions": positions}, watcher)
        for pair, share in watcher.lost.items():
            total[pair] = total.get(pair, 0.0) + share / len(texts)
    return total
