"""Ranges of integers found together in blocks of layers whose errors depend on each other (Q-VLM, Wang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.encoding import Affine
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.shapes import derive
from ...ir.weight import Weight
from .._walk import Walk
from ..activations._static import Grid, entropy
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ..weights._matrices import Siblings, all_dense
from ..weights._range import clipped
from ._products import rounded, sites


@dataclass(frozen=True)
class Ranges(Pass):
    """Rounds products' weights and inputs to integers whose ranges let a block of products err least together.

    (arXiv:2410.08119.) Errors of layers depend on each other where the entropy of rounded activations is large: a block
    ends in front of products that read one below the mean, and at `longest`. In a block each range in turn is shrunk to
    where the relative squared error of what its products give is least, one range counting in all that follow it; what
    precedes the block is rounded already.

    bits, reads: widths of weights and of activations.
    longest: most sets of products that read the same in a block; with 1 each is searched alone.
    least: smallest share of the whole range that is tried, in steps of 0.1.
    tower: how much a bit of entropy counts beside the relative error where a product sees an image and no words.

    Deviations: the authors' script searches layer by layer; here blocks are those of the paper. All products of
    a block count, as a residual stream takes what one gives past the others. Activations are rounded to values, not
    kept as codes: it is the weights that take fewer bytes.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    bits: int = 4
    reads: int = 4
    longest: int = 3
    least: float = 0.4
    tower: float = 1e-3

    def __post_init__(self) -> None:
        Affine(self.bits, 0)
        if not 2 <= self.reads <= 8:
            raise SmeltError(f"reads is a width of 2 to 8 bits, not {self.reads}")
        if self.longest < 1:
            raise SmeltError(f"longest counts products from 1, but is {self.longest}")
        if not 0 < self.least <= 1 or self.tower < 0:
            raise SmeltError("least is a share of a range, above 0 and at most 1, and tower a weight of at least 0")

    @property
    def calibration(self) -> Calibration:
        """Whatever the model reads."""
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """Dense matrices, and activations that are not rounded yet."""
        yield from all_dense(program, [name for each in sites(program, [self.bits])[0] for name in each.names])
        if why := rounded(program):
            yield why

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Round everything to its whole range, and shrink the ranges of one block after the other."""
        if samples is None:
            raise SmeltError("search.ranges measures errors on samples: give some of the model's inputs")
        derive(program)
        found, skipped = sites(program, [self.bits])
        before = program.fork()
        same = dict(zip(program.graph.nodes, before.graph.nodes, strict=True))
        whole = Walk(before, samples)
        made = [self._site(program, site, [value for (value,) in whole.values(same[site.x])]) for site in found]
        blocks = partition([site.entropy for site in made], self.longest)
        whole, walk = Walk(before, samples), Walk(program, samples)
        told: list[dict[str, Any]] = []
        for number, block in enumerate(blocks):
            members = [made[at] for at in block]
            samples.progress(number, len(blocks), f"ranges from {members[0].of.names[0]} on")
            meant = list(whole.values(*(same[node] for site in members for node in site.of.nodes)))
            told.append(self._search(walk, members, meant))
        done = tuple(name for site in found for name in site.names)
        if not done:
            return Outcome((), skipped)
        count = sum(math.prod(program.weights[name].shape) for name in done)
        bits = sum(program.weights[name].bits for name in done) / count
        return Outcome(done, skipped, {"bits_per_weight": round(bits, 4), "blocks": told})

    def _site(self, program: Program, site: Siblings, values: list[torch.Tensor]) -> _Site:
        """A site rounded to its whole range, of which `values` are read."""
        span = min(float(value.min()) for value in values), max(float(value.max()) for value in values)
        grid = Grid.over(*span, self.reads)
        spread = entropy(torch.cat([grid.codes(value).flatten() for value in values]))
        put = grid.put(program, site.x, list(site.nodes))
        dense = {name: program.weights[name] for name in site.names}
        made = _Site(program, site, self.bits, self.reads, span, spread, _sees(program, site.x), dense, put, grid)
        made.set(1.0, 1.0)
        return made

    def _search(self, walk: Walk, members: list[_Site], meant: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
        """Shrink the ranges of a block's sites in turn; what was found."""
        outputs = [node for site in members for node in site.of.nodes]
        sizes = [sum(float(v.square().sum()) for v in values) or 1.0 for values in zip(*meant, strict=True)]
        seeing = [site for site in members if site.sees and self.tower]
        asked = (members[0].of.x, *outputs, *(site.of.x for site in seeing))

        def loss() -> float:
            total = 0.0
            codes: list[list[torch.Tensor]] = [[] for _ in seeing]
            for given, wanted in zip(walk.values(*asked), meant, strict=True):
                for value, target, size in zip(given[1 : 1 + len(wanted)], wanted, sizes, strict=True):
                    total += float((value - target).square().sum()) / size
                for site, held, value in zip(seeing, codes, given[1 + len(wanted) :], strict=True):
                    held.append(site.grid.codes(value).flatten())
            return total / len(outputs) + self.tower * sum(entropy(torch.cat(held)) for held in codes)

        first = least = loss()
        shares = [round(1 - i / 10, 1) for i in range(1, 1 + round((1 - self.least) * 10))]
        for site in members:
            for which in ("reads", "weights"):
                kept = site.reads_share, site.weights_share
                for share in shares:
                    site.set(*((share, kept[1]) if which == "reads" else (kept[0], share)))
                    if (found := loss()) < least:
                        least, kept = found, (site.reads_share, site.weights_share)
                site.set(*kept)
        told = {
            site.of.names[0]: {
                "reads": site.reads_share,
                "weights": site.weights_share,
                "entropy": round(site.entropy, 3),
            }
            for site in members
        }
        return {"loss": [float(f"{first:.3g}"), float(f"{least:.3g}")], "shares": told}


@dataclass
class _Site:
    """Products that read the same: `span` and `entropy` are those of what they read, `dense` are their weights."""

    program: Program
    of: Siblings
    bits: int
    reads: int
    span: tuple[float, float]
    entropy: float
    sees: bool
    dense: Mapping[str, Weight]
    put: fx.Node
    grid: Grid
    reads_share: float = 1.0
    weights_share: float = 1.0

    def set(self, reads: float, weights: float) -> None:
        """Round to these shares of the whole ranges."""
        self.reads_share, self.weights_share = reads, weights
        self.grid = Grid.over(self.span[0] * reads, self.span[1] * reads, self.reads)
        self.grid.move(self.put)
        for name, weight in self.dense.items():
            encoding = Affine(self.bits, 0)
            self.program.weights[name] = Weight(weight.shape, encoding, clipped(weight.dense(), encoding, weights))
            self.program.touch(name)


def partition(entropies: Sequence[float], longest: int) -> list[range]:
    """Blocks of neighbours: each begins where the entropy is below the mean, or where the last one has its length."""
    mean = sum(entropies) / max(1, len(entropies))
    starts: list[int] = []
    for at, spread in enumerate(entropies):
        if not starts or spread < mean or at - starts[-1] == longest:
            starts.append(at)
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(entropies)], strict=True)]


def _sees(program: Program, x: fx.Node) -> bool:
    """Whether a value is computed from images [B, C, H, W] alone."""
    told = program.facts.get("inputs") or {}
    seen, ahead = set[fx.Node](), [x]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    names = [str(node.target) for node in seen if node.op == "placeholder"]
    return bool(names) and all(len(told.get(name, {}).get("shape", ())) == 4 for name in names)
