"""What a search chooses among: for every site of a program the ways in which it may be stored, the smallest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from ...ir.blocks import blocks, renumber, without
from ...ir.cache import CachePlan
from ...ir.cache.plan import Site as CacheSite
from ...ir.encoding import Encoding
from ...ir.program import Program
from ...ir.text import parse_program, print_program
from ...ir.weight import Weight
from ..cache.encode import Encode

Candidate: TypeAlias = tuple[int, ...]  # a level for every site


@dataclass(frozen=True)
class Stored:
    """How a cache site may store what leaves its tail; what is not given stays as it is.

    keys: encoding of keys.
    values: encoding of values.
    """

    keys: Encoding | None = None
    values: Encoding | None = None

    def at(self, program: Program, layer: int) -> CacheSite:
        """The site of a layer, stored so."""
        assert program.cache is not None
        if self.keys is None and self.values is None:
            return program.cache[layer]
        encoded = replace(program)
        Encode(self.keys, self.values, layers=(layer,)).apply(encoded, None)
        assert encoded.cache is not None
        return encoded.cache[layer]

    def __str__(self) -> str:
        told = [f"{role} {e}" for role, e in (("keys", self.keys), ("values", self.values)) if e is not None]
        return ", ".join(told) or "as it is"


@dataclass(frozen=True)
class Site:
    """One choice. `at`: a weight's name, or the number of a block or of a cache's layer; `levels` from small to large.

    `inside`: the site of the block with which it leaves, by number.
    """

    kind: Literal["weight", "block", "cache"]
    at: Any
    name: str
    levels: tuple[str, ...]
    inside: int | None = None


@dataclass(frozen=True)
class Space:
    """A program, its sites, and what each level puts in their place: weights by name, cache sites by layer.

    Sites of blocks come first, in order. `leaves`: by which of them weights (by name) and cache sites (by layer) leave.
    It can be sent to another process: a graph travels as its text.
    """

    program: Program
    sites: tuple[Site, ...]
    weights: Mapping[str, Sequence[Weight]]
    caches: Mapping[int, Sequence[CacheSite]]
    leaves: Mapping[str, Mapping[Any, int]]

    def alive(self, candidate: Candidate, number: int) -> bool:
        """Whether a site is there, or left with its block."""
        inside = self.sites[number].inside
        return inside is None or candidate[inside] > 0

    def key(self, candidate: Candidate) -> str:
        """What decides a candidate, in print: levels, and - where a site left with its block."""
        return ",".join(str(level) if self.alive(candidate, i) else "-" for i, level in enumerate(candidate))

    def attends(self, candidate: Candidate) -> bool:
        """Whether some attention is left, without which there is no decoder."""
        kept = [c for site, c in zip(self.sites, candidate, strict=True) if site.levels == ATTENTION]
        return not kept or any(kept)

    def build(self, candidate: Candidate) -> Program:
        """The program with every site at its level."""
        program = self.program.fork()
        found, left_out = blocks(program), []
        for number, (site, level) in enumerate(zip(self.sites, candidate, strict=True)):
            if site.kind == "block" and not level:
                left_out.append(found[site.at])
            elif site.kind == "weight" and self.alive(candidate, number):
                program.weights[site.at] = self.weights[site.at][level]
            elif site.kind == "cache" and self.alive(candidate, number):
                assert program.cache is not None
                program.cache = program.cache.with_site(self.caches[site.at][level])
        without(program, left_out)
        return program

    def put(self, candidate: Candidate, program: Program) -> None:
        """Put a candidate in the program's place; its cache sites are counted from 0 again."""
        made = self.build(candidate)
        renumber(made)
        program.graph, program.weights, program.cache = made.graph, made.weights, made.cache
        program.touch(*made.weights, *(("cache",) if self.caches else ()))

    def told(self, candidate: Candidate) -> dict[str, str]:
        """The level of every site that is there."""
        pairs = enumerate(zip(self.sites, candidate, strict=True))
        return {site.name: site.levels[level] for i, (site, level) in pairs if self.alive(candidate, i)}

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(self.program, cache=None, history=(), origin={})
        text = print_program(plain, hashes=False)
        return {**vars(self), "program": (text, self.program.weights, self.program.cache)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        text, weights, cache = state["program"]
        program = replace(parse_program(text, weights, sealed=True), cache=cache)
        for name, value in {**state, "program": program}.items():
            object.__setattr__(self, name, value)


ATTENTION, FEEDFORWARD = ("left out", "attends"), ("left out", "kept")


def block_sites(program: Program) -> tuple[list[Site], dict[str, int], dict[int, int]]:
    """A site for each block, and by which of them weights and cache sites leave."""
    sites: list[Site] = []
    names: dict[str, int] = {}
    layers: dict[int, int] = {}
    for number, block in enumerate(blocks(program)):
        sites.append(Site("block", number, str(block), ATTENTION if block.kind == "attention" else FEEDFORWARD))
        left = program.fork()
        without(left, [blocks(left)[number]])
        names |= {name: number for name in program.weights.keys() - left.weights.keys()}
        layers |= {layer: number for layer in _layers(program.cache) - _layers(left.cache)}
    return sites, names, layers


def _layers(plan: CachePlan | None) -> set[int]:
    return {site.layer for site in plan.sites} if plan is not None else set()
