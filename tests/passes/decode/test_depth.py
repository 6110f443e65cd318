"""decode.shorten and decode.thin: the stages they plan, what they ask for, and that the model itself stays."""

import pytest

from smelt.ir import decode
from smelt.ir.depth import DepthPlan, Stage
from smelt.ir.errors import SmeltError
from smelt.passes import Samples
from smelt.passes.decode.lookup import Lookup
from smelt.passes.decode.shorten import Shorten
from smelt.passes.decode.thin import Thin
from smelt.passes.manager import StepFailed, run
from smelt.recipes import Step


def step(pass_, name="decode.shorten"):
    return Step(name, name, pass_, {})


@pytest.mark.parametrize(
    ("options", "count", "wanted"),
    [
        ({"least": 4, "tokens": 64}, 6, {0: 6, 16: 5, 48: 4}),
        ({"least": 2, "tokens": 9, "levels": 2}, 6, {0: 6, 4: 2}),
        ({"least": 2, "tokens": 9, "levels": 3}, 6, {0: 6, 2: 4, 6: 2}),
        ({"least": 4, "most": 4}, 6, {0: 4}),
        ({"least": 4, "tokens": 1}, 6, {0: 4}),
    ],
)
def test_the_level_next_to_the_line_runs(options, count, wanted):
    shorten = Shorten(**options)
    levels = shorten._levels(*shorten._ends(count))
    assert levels == wanted
    for token in range(shorten.tokens if shorten.tokens > 1 else 0):
        line = count - (count - shorten.least) * token / (shorten.tokens - 1)
        active = levels[max(start for start in levels if start <= token)]
        assert shorten.most or abs(active - line) == min(abs(level - line) for level in levels.values())


def test_lower_middle_layers_rest(cached):
    before = list(cached.graph.nodes)
    outcome = Shorten(least=1, tokens=10).apply(cached, None)
    assert cached.depth == DepthPlan((Stage(5, (1,), (1,)),))
    assert outcome.done == ("layer 1",) and 0 < outcome.notes["bytes read"]["from token 5"] < 1
    assert list(cached.graph.nodes) == before and "decode" in cached.touched
    assert list(Shorten(least=1).requires(cached)) == [
        "llama must run all of its blocks, but leaves some out: keep one of the two steps"
    ]


def test_all_layers_are_nothing_to_do(cached):
    outcome = Shorten(least=2).apply(cached, None)
    assert not outcome.done and cached.depth is None
    assert list(Shorten(least=3).requires(cached)) == [
        "least and most must be numbers of layers from 1 (the warm-up) to 2, least at most most, but are 3 and 2"
    ]
    with pytest.raises(SmeltError, match="tokens count from 1, levels from 2 and warmup from 0, not 0, 8, 1"):
        Shorten(tokens=0)


def test_parts_that_turn_the_stream_stay(cached, tokens):
    samples = Samples(tokens(4, 32))
    program = cached.fork()
    notes = Thin(threshold=-1.0, first=0, last=0, warmup=3).apply(program, samples).notes
    assert program.depth == DepthPlan((Stage(3, (), (0, 1)),))
    low, high = sorted(notes["cosines"].values())
    program = cached.fork()
    outcome = Thin(threshold=(low + high) / 2, first=0, last=0).apply(program, samples)
    (kept,) = outcome.skipped
    assert notes["cosines"][kept] == low and outcome.skipped[kept].startswith(f"cosine {low:.3f}, below the threshold")
    program = cached.fork()
    assert not Thin(threshold=1.01, first=0, last=0).apply(program, samples).done and program.depth is None
    assert Thin(threshold=-1.0).apply(program, samples).skipped == {"layer 0": "cold", "layer 1": "cold"}


def test_what_is_left_out_is_measured_and_shown(cached):
    made = run(cached, [step(Shorten(least=1, tokens=8))])
    (report,) = made.report.steps
    assert report.divergence.kl > 1e-3 and made.program.origin["decode"].name == "decode.shorten"


def test_drafts_and_a_schedule_do_not_meet(cached):
    drafting = cached.fork()
    drafting.decode = decode.DecodePlan(decode.Lookup())
    with pytest.raises(StepFailed, match="must not draft, but decodes by lookup: drafted tokens of one step"):
        run(drafting, [step(Shorten(least=1))])
    shortened = run(cached, [step(Shorten(least=1))]).program
    with pytest.raises(StepFailed, match="and drafted tokens of one step stand at several"):
        run(shortened, [step(Lookup(), "decode.lookup")])
