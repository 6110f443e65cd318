"""The manager: contracts refuse with a reason, promises are checked by running, and what fails leaves no trace."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from smelt.ir import decode as drafts
from smelt.ir.cache import CachePlan, Select
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.ir.text import same_program
from smelt.ir.weight import Weight
from smelt.passes import Exactness, Outcome, Pass, Samples
from smelt.passes import witness as witness_module
from smelt.passes.events import StepDone, StepProgress, StepRolledBack, StepStarted
from smelt.passes.manager import StepFailed, run
from smelt.recipes import Gate, Step

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def scaled(program: Program, name: str, factor: float) -> None:
    program.weights[name] = Weight.of(program.weights[name].dense() * factor)


@dataclass(frozen=True)
class Scale(Pass):
    """Scales one weight."""

    effects = frozenset({"numerics"})
    factor: float = 1.05
    name: str = UP

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        scaled(program, self.name, self.factor)
        return Outcome((self.name,), {"b": "too narrow", "c": "too narrow"}, {"factor": self.factor})


@dataclass(frozen=True)
class Lie(Scale):
    """Scales one weight and calls that exact."""

    exactness: ClassVar[Exactness] = Exactness.EXACT


@dataclass(frozen=True)
class Balance(Pass):
    """Scales one projection up and the one behind it down: exact, up to rounding."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects = frozenset({"numerics"})
    factor: float = 3.0

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        scaled(program, UP, self.factor)
        scaled(program, DOWN, 1 / self.factor)
        program.touch(UP, DOWN)
        return Outcome((UP, DOWN))


@dataclass(frozen=True)
class Nothing(Pass):
    """Finds no site, and spoils its fork all the same."""

    skipped: tuple[str, ...] = ("narrow", "narrow", "shared")

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        program.weights.clear()
        return Outcome((), {f"s{i}": reason for i, reason in enumerate(self.skipped)})


@dataclass(frozen=True)
class Needy(Pass):
    """Has two facts that do not hold."""

    def requires(self, program: Program) -> Iterator[str]:
        yield f"{UP} must be tall, but is wide{program.changed_by(UP)}"
        yield "the moon must be full"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        raise AssertionError("runs although its contract does not hold")


@dataclass(frozen=True)
class Reads(Scale):
    """Reads calibration text."""

    calibration = "text"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        assert samples is not None
        samples.progress(1, 2, "reading")
        return Outcome(("a",), notes={"rows": len(samples.tokens)})


@dataclass(frozen=True)
class Draft(Pass):
    """Sets a decode plan, and scales a weight where it should not."""

    effects = frozenset({"decode"})
    factor: float = 1.0

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        program.decode = DecodePlan(drafts.Recycle(Tree((0, 0), (0, 0)), 2))
        if self.factor != 1.0:
            scaled(program, UP, self.factor)
        return Outcome(("decode",))


@dataclass(frozen=True)
class Stealth(Draft):
    """Sets a decode plan without saying so."""

    effects = frozenset({"numerics"})


@dataclass(frozen=True)
class Broken(Pass):
    """Breaks the Program in one way."""

    effects = frozenset({"numerics"})
    how: str = "refuse"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        if self.how == "refuse":
            raise SmeltError("layer 7 has no place here")
        if self.how == "bug":
            raise KeyError("oops")
        if self.how == "graph":
            del program.weights[UP]
        if self.how == "nan":
            scaled(program, UP, float("nan"))
        notes = {"tensor": torch.ones(1)} if self.how == "notes" else {}
        return Outcome((UP,), notes=notes)


@dataclass(frozen=True)
class Compress(Pass):
    """Stores the cache at `bits`, behind a tail of 16."""

    effects = frozenset({"numerics", "cache"})
    bits: int = 2
    tail: int = 16

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        assert program.cache is not None
        code = Affine(self.bits, 32, zero=True)
        sites = [replace(s, tail=self.tail, page=16, keys=code, values=code) for s in program.cache.sites]
        program.cache = CachePlan(tuple(sites))
        return Outcome(tuple(f"layer {site.layer}" for site in sites))


def step(pass_: Pass, **extras) -> Step:
    """A step named after its pass, on line 12."""
    name = f"toy.{type(pass_).__name__.lower()}"
    options = {key: value for key, value in vars(pass_).items()}
    return Step(**{"name": name, "pass_name": name, "pass_": pass_, "options": options, "place": "r.yaml:12"} | extras)


def fails(program: Program, *steps: Step, **options) -> StepFailed:
    with pytest.raises(StepFailed) as caught:
        run(program, steps, **options)
    return caught.value


def test_records_what_a_pass_did(cached):
    before = cached.fork()
    result = run(cached, [step(Scale())])
    program, done = result.program, result.report.steps[0]
    assert (done.status, done.done, done.notes) == ("done", (UP,), {"factor": 1.05})
    assert done.skipped == {"b": "too narrow", "c": "too narrow"}
    assert done.weight_bytes == (cached.nbytes, cached.nbytes) and done.cache_bits == (32.0, 32.0)
    assert 1e-6 < done.divergence.kl < 1e-2 and done.from_source == done.divergence
    record = program.history[0]
    assert str(record) == "step 1, toy.scale" and record.options == {"factor": 1.05, "name": UP}
    assert record.report["done"] == [UP]
    assert json.loads(json.dumps(record.report)) == record.report
    assert program.origin == {UP: record} and program.touched == set()
    assert same_program(before, cached) is None, "the given program was changed"


def test_steps_count_on_from_the_history(llama):
    once = run(llama, [step(Balance())]).program
    twice = run(once, [step(Scale()), step(Balance(), name="again")]).program
    assert [str(record) for record in twice.history] == [
        "step 1, toy.balance",
        "step 2, toy.scale",
        "step 3, toy.balance",
    ]


def test_every_unmet_fact_is_named_with_the_step_that_made_it_so(llama):
    fault = fails(llama, step(Scale()), step(Needy()))
    assert str(fault) == (
        f"r.yaml:12: step 2, toy.needy: {UP} must be tall, but is wide since step 1, toy.scale; the moon must be full"
    )


def test_a_step_without_a_place_is_named_alone(llama):
    assert str(fails(llama, step(Needy(), place="", name="mine"))).startswith(f"step 1, mine: {UP} must be tall")


def test_a_failure_keeps_the_last_good_program_and_the_report(llama):
    good = run(llama, [step(Scale())]).program
    fault = fails(llama, step(Scale()), step(Broken()))
    assert str(fault) == "r.yaml:12: step 2, toy.broken: layer 7 has no place here"
    assert [s.status for s in fault.report.steps] == ["done", "failed"]
    assert fault.report.steps[1].why == "layer 7 has no place here"
    assert fault.program.weights.keys() == good.weights.keys()
    assert torch.equal(fault.program.weights[UP].dense(), good.weights[UP].dense())


def test_calibration_that_is_missing_is_asked_for(llama):
    assert str(fails(llama, step(Reads()))) == (
        "r.yaml:12: step 1, toy.reads: calibrates on samples, and there are none: "
        "give texts with --calibration FILE, or calibration="
    )


def test_calibration_is_held_out_and_its_progress_heard(llama, tokens):
    heard, told = [], []
    samples = Samples(tokens(16, 40), lambda *event: told.append(event))
    report = run(llama, [step(Reads())], samples, heard.append).report
    assert report.steps[0].notes == {"rows": 14}
    assert told == [(1, 2, "reading")]
    assert StepProgress(1, "toy.reads", 1, 2, "reading") in heard


def test_matching_nothing_is_an_error_with_grouped_reasons(llama):
    assert str(fails(llama, step(Nothing()))) == (
        "r.yaml:12: step 1, toy.nothing: matched nothing: 2 × narrow (s0, s1); 1 × shared (s2). "
        "Say `optional: true` if that is fine"
    )
    assert "matched nothing: the program has no site of this kind." in str(fails(llama, step(Nothing(skipped=()))))


def test_an_optional_step_may_match_nothing_and_leaves_no_trace(llama):
    result = run(llama, [step(Nothing(), optional=True)])
    assert result.report.steps[0].status == "nothing to do"
    assert same_program(result.program, llama) is None


def test_an_exact_pass_that_is_not_is_found_out(cached):
    fault = fails(cached, step(Lie()))
    assert str(fault).startswith("r.yaml:12: step 1, toy.lie: claims exact but differs by ")
    assert str(fault).endswith("(relative, allowed 1e-05): a fault in the pass")
    assert fails(cached, step(Lie(1.001)))  # a tenth of a percent in one weight of fourteen
    assert run(cached, [step(Lie(1.0))]).report.steps[0].divergence.max_error == 0


def test_an_exact_pass_may_reorder_sums(cached):
    done = run(cached, [step(Balance())]).report.steps[0]
    assert 0 < done.divergence.max_error <= 1e-5


def test_an_exact_pass_may_flip_codes_of_a_lossy_cache_but_not_lie_through_it(cached, monkeypatch):
    lossy = run(cached, [step(Compress(8))]).program
    heard = []
    real = witness_module.Witness.same_on_dense_cache
    monkeypatch.setattr(witness_module.Witness, "same_on_dense_cache", lambda *a: heard.append(real(*a)) or heard[-1])
    errors = [run(lossy, [step(Balance(by))]).report.steps[0].divergence.max_error for by in (1.7, 0.3, 0.6, 5.0, 7.0)]
    flipped = sum(error > 1e-5 for error in errors)
    assert flipped > 0 and heard == [True] * flipped
    assert fails(lossy, step(Lie())) and heard[-1] is False


def test_a_pass_that_only_decodes_is_not_replayed(cached, monkeypatch):
    monkeypatch.setattr(witness_module, "observe", lambda *_: pytest.fail("replayed"))
    done = run(cached, [step(Draft())]).report.steps[0]
    assert (done.divergence.kl, done.divergence.top1, done.divergence.max_error) == (0, 1, 0)


def test_a_pass_that_only_decodes_must_leave_the_logits(cached):
    assert "declares only the effects ['decode'] but differs by" in str(fails(cached, step(Draft(1.05))))


def test_an_undeclared_effect_is_found_out(cached):
    assert "changes the program's decode, but declares only the effects ['numerics']" in str(
        fails(cached, step(Stealth()))
    )


def test_a_graph_that_does_not_verify_is_an_error_of_the_step(llama):
    assert str(fails(llama, step(Broken("graph")))).startswith("r.yaml:12: step 1, toy.broken: llama: ")


def test_a_bug_propagates_with_a_note(llama):
    with pytest.raises(KeyError) as caught:
        run(llama, [step(Broken("bug"))])
    assert caught.value.__notes__ == [
        "in r.yaml:12: step 1, toy.broken: this is a bug in the pass; the program before it is unharmed"
    ]
    with pytest.raises(TypeError):
        run(llama, [step(Broken("notes"))])


def test_outputs_that_are_not_finite_do_not_stand(llama):
    assert "makes outputs that are not finite" in str(fails(llama, step(Broken("nan"))))
    gate = Gate(max_kl=0.5)
    assert run(llama, [step(Broken("nan"), gate=gate)]).report.steps[0].status == "rolled back"


def test_a_gate_rolls_back_and_the_program_is_as_before(cached):
    heard = []
    result = run(cached, [step(Scale(3.0), gate=Gate(max_kl=1e-3)), step(Balance())], listen=heard.append)
    first = result.report.steps[0]
    assert first.status == "rolled back" and first.why == f"kl {first.divergence.kl:.2g} > 0.001"
    alone = run(cached, [step(Balance())]).program
    assert torch.equal(result.program.weights[UP].dense(), alone.weights[UP].dense())
    assert [str(record) for record in result.program.history] == ["step 2, toy.balance"]
    undone = next(event for event in heard if isinstance(event, StepRolledBack))
    assert same_program(undone.program, cached) is None
    assert result.report.steps[1].divergence.max_error <= 1e-5, "compared to the step that was undone"
    assert result.report.steps[1].from_source.max_error <= 1e-5


def test_a_gate_on_agreement(cached):
    result = run(cached, [step(Scale(5.0), gate=Gate(min_top1=0.99))])
    assert result.report.steps[0].why.startswith("top-1 0.") and result.report.steps[0].why.endswith(" < 0.99")
    assert run(cached, [step(Scale(1.001), gate=Gate(max_kl=0.1, min_top1=0.5))]).report.steps[0].status == "done"


def test_a_gate_measures_from_the_step_before(cached):
    steps = [step(Scale(3.0)), step(Scale(1.001), name="again", gate=Gate(max_kl=1e-3))]
    done = run(cached, steps).report.steps[1]
    assert done.status == "done" and done.divergence.kl < 1e-3 < done.from_source.kl


def test_a_gate_may_stop(cached):
    fault = fails(cached, step(Balance()), step(Scale(3.0), gate=Gate(max_kl=1e-3, otherwise="stop")))
    assert str(fault).startswith("r.yaml:12: step 2, toy.scale: stopped by its gate: kl ")
    assert [str(record) for record in fault.program.history] == ["step 1, toy.balance"]


def test_a_bound_that_is_missed_by_little_is_told_apart():
    from smelt.passes.manager import _beyond

    assert _beyond("kl", 0.031, ">", 0.02) == "kl 0.031 > 0.02"
    assert _beyond("kl", 0.020004, ">", 0.02) == "kl 0.020004 > 0.02"


def test_a_compressed_cache_is_measured_with_pages_in_it(cached):
    done = run(cached, [step(Compress(2)), step(Compress(8), name="wider")]).report.steps
    assert done[0].divergence.kl > 1e-3 and done[0].cache_bits[0] == 32 > done[0].cache_bits[1]
    assert done[1].from_source.kl < done[0].from_source.kl / 10
    late = run(cached, [step(Scale(3.0)), step(Compress(8, tail=150), name="late")]).report.steps
    assert late[1].divergence.max_error > 1e-4, "a tail of 150 needs a longer prompt"
    assert late[1].divergence.kl < 1e-3 < late[1].from_source.kl, "compared to the source instead of the step before"
    assert "probe" not in late[1].notes
    never = run(cached, [step(Compress(2, tail=240))]).report.steps[0]
    assert never.notes["probe"] == "the cache encodes nothing before 256 tokens, but the probe's prompt ends at 224"


def test_dropped_tokens_are_measured(cached):
    @dataclass(frozen=True)
    class Drop(Compress):
        def apply(self, program: Program, samples: Samples | None) -> Outcome:
            assert program.cache is not None
            select = Select("recency", 0.5)
            program.cache = CachePlan(tuple(replace(s, tail=8, page=8, select=select) for s in program.cache.sites))
            return Outcome(("all",))

    assert run(cached, [step(Drop())]).report.steps[0].divergence.kl > 1e-3


def test_stops_after_a_step(llama):
    steps = [step(Balance()), step(Scale()), step(Broken())]
    assert [s.name for s in run(llama, steps, stop_after="toy.scale").report.steps] == ["toy.balance", "toy.scale"]
    with pytest.raises(SmeltError, match=r"no step is named 'toy.scal' \(did you mean 'toy.scale'\?\); steps: toy.bal"):
        run(llama, steps, stop_after="toy.scal")


def test_a_listener_follows(llama):
    heard = []
    result = run(llama, [step(Balance()), step(Nothing(), optional=True)], listen=heard.append)
    kinds = [type(event) for event in heard if not isinstance(event, StepProgress)]
    assert kinds == [StepStarted, StepDone, StepStarted, StepDone]
    assert heard[0] == StepStarted(1, 2, "toy.balance", "toy.balance")
    assert heard[-1].program is result.program


def test_no_steps_are_no_work(llama, monkeypatch):
    monkeypatch.setattr(witness_module, "observe", lambda *_: pytest.fail("replayed"))
    assert run(llama, []).program is llama
