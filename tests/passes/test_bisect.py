"""Bisecting: the step that takes a Program too far is named, and the one bad weight of it stands first."""

from dataclasses import dataclass, replace

import pytest

from smelt.ir.cache import CachePlan
from smelt.ir.encoding import Affine
from smelt.ir.program import Program
from smelt.ir.weight import Weight
from smelt.passes import Outcome, Pass, Samples
from smelt.passes import bisect as bisect_module
from smelt.passes.bisect import bisect
from smelt.passes.events import StepProgress
from smelt.recipes import Gate, Step

UP, DOWN = (f"model.layers.{layer}.mlp.{name}_proj.weight" for layer, name in ((0, "up"), (1, "down")))


@dataclass(frozen=True)
class Scale(Pass):
    """Scales weights by name."""

    effects = frozenset({"numerics"})
    factors: tuple[tuple[str, float], ...] = ()

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        for name, factor in self.factors:
            program.weights[name] = Weight.of(program.weights[name].dense() * factor)
        return Outcome(tuple(name for name, _ in self.factors))


@dataclass(frozen=True)
class Rename(Scale):
    """Scales weights under new names, so that the graph is another."""

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        outcome = super().apply(program, samples)
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target in outcome.done:
                program.weights[f"new.{node.target}"] = program.weights.pop(node.target)
                node.target = f"new.{node.target}"
        return outcome


@dataclass(frozen=True)
class Compress(Pass):
    """Encodes the cache of layer 0 at 2 bits and that of layer 1 at 8."""

    effects = frozenset({"numerics", "cache"})

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        assert program.cache is not None
        codes = Affine(2, 32, zero=True), Affine(8, 32, zero=True)
        sites = (replace(s, tail=16, page=16, keys=c) for s, c in zip(program.cache.sites, codes, strict=True))
        program.cache = CachePlan(tuple(sites))
        return Outcome(("all",))


def step(name: str, pass_: Pass, **extras) -> Step:
    return Step(name=name, pass_name=f"toy.{name}", pass_=pass_, options={}, **extras)


MILD = step("mild", Scale(((UP, 1.01),)))
HARSH = step("harsh", Scale(((UP, 1.02), (DOWN, 3.0))))
AFTER = step("after", Scale(((UP, 1.01),)))


def test_names_the_step_and_its_worst_weight(cached):
    found = bisect(cached, [MILD, HARSH, AFTER], max_kl=0.02)
    assert [s.name for s in found.steps] == ["mild", "harsh", "after"]
    assert found.guilty is found.steps[1] is found.worst
    assert found.steps[0].kl < 0.02 < found.steps[1].kl
    assert [site.site for site in found.sites] == [DOWN, UP]
    assert found.sites[0].kl > 100 * found.sites[1].kl > 0
    assert found.sites[0].kl == pytest.approx(found.guilty.own_kl, rel=0.2)
    assert "2 harsh  ← first beyond 0.02" in str(found) and DOWN in str(found)


def test_small_harms_add_up(cached):
    steps = [step(name, Scale(((DOWN, 1.4),))) for name in ("one", "two", "three")]
    kl = [s.kl for s in bisect(cached, steps, max_kl=100).steps]
    found = bisect(cached, steps, max_kl=(kl[1] + kl[2]) / 2)
    assert found.guilty is found.steps[2] and found.guilty.own_kl < found.max_kl


def test_names_nobody_when_all_is_well(cached):
    found = bisect(cached, [MILD, AFTER], max_kl=1.0)
    assert found.guilty is None and found.sites == ()
    assert "no step takes the program beyond a KL of 1" in str(found)
    assert bisect(cached, []).worst is None


def test_tries_cache_sites_one_at_a_time(cached):
    found = bisect(cached, [step("compress", Compress())], max_kl=1e-3)
    assert [site.site for site in found.sites] == ["cache layer 0", "cache layer 1"]
    assert found.sites[0].kl > 10 * found.sites[1].kl > 0


def test_says_why_there_are_no_sites(cached):
    found = bisect(cached, [step("rename", Rename(((DOWN, 3.0),)))], max_kl=0.02)
    assert found.sites == () and found.note.startswith("rename rewrites the graph")


def test_tries_the_largest_sites_and_says_how_many_it_left(cached, monkeypatch):
    monkeypatch.setattr(bisect_module, "SITES", 1)
    heard = []
    found = bisect(cached, [HARSH], max_kl=0.02, listen=heard.append)
    assert len(found.sites) == 1 and found.note == "the 1 smallest sites of harsh were not tried"
    assert StepProgress(1, "harsh", 0, 1, found.sites[0].site) in heard


def test_a_gate_that_stops_does_not_stop_it_and_one_that_rolls_back_clears_the_step(cached):
    stop = replace(HARSH, gate=Gate(max_kl=0.02, otherwise="stop"))
    assert bisect(cached, [stop], max_kl=0.02).guilty is not None
    back = replace(HARSH, gate=Gate(max_kl=0.02))
    found = bisect(cached, [MILD, back, AFTER], max_kl=0.02)
    assert found.guilty is None and [s.name for s in found.steps] == ["mild", "after"]
