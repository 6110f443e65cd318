"""What is measured is measured through the kernels, and each check finds the fault that it is there for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import smelt
from smelt.codegen.lower import lower
from smelt.ir.cache import Cache
from smelt.ir.weight import Weight
from smelt.model import Compiled
from smelt.passes.measure import replay as replay_by_meaning
from smelt.quality import METRICS, NEEDS_SOURCE, Meter, Source, replay
from smelt.recipes import Bound
from smelt.texts import HELD_OUT, TRAINING, Text, held_out_text, training_texts
from smelt.verify import Check, say, verify

from . import tiny

SPECULATIVE = {"name": "s", "family": "decode", "does": "x", "steps": ["cache.insert", "decode.recycle"]}


@pytest.fixture(scope="module")
def plain() -> Compiled:
    return smelt.compile(tiny.model(), "none")


@pytest.fixture(scope="module")
def drafting() -> Compiled:
    return smelt.compile(tiny.model(), SPECULATIVE)


@pytest.fixture(scope="module")
def text() -> Text:
    random = torch.Generator().manual_seed(0)
    return Text(torch.randint(4096, (600,), generator=random).tolist(), 4096, 256)


@pytest.fixture(scope="module")
def source(plain: Compiled, text: Text) -> Source:
    return Source(plain, text)


def scaled(compiled: Compiled, factor: float) -> Compiled:
    """The same program with one weight changed."""
    program = compiled.program.fork()
    name = "model.layers.0.mlp.up_proj.weight"
    program.weights[name] = Weight.of(program.weights[name].dense() * factor)
    return Compiled(program, compiled.facts, compiled.assets)


def of(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.metric: check for check in checks}


def test_replay_through_kernels_gives_the_meaning(plain: Compiled, text: Text) -> None:
    meant = replay_by_meaning(plain.program, text.windows, text.prefix - 1)[:, :-1]
    got = replay(plain.plan, text.windows, text.prefix)
    largest = meant.abs().max()
    assert got.shape == meant.shape == (2, 256 - 128, 4096)
    assert (got - meant).abs().max() <= 1e-4 * largest
    for mutant in (got.roll(1, 1), got * 1.05, got.index_fill(1, torch.tensor(7), 0)):  # shifted, scaled, a row dropped
        assert (mutant - meant).abs().max() > 1e-3 * largest


def test_an_unchanged_model_keeps_everything(plain: Compiled, text: Text, source: Source) -> None:
    found = Meter(plain, text, source).all()
    assert set(found) == set(METRICS)
    assert found["bits_per_weight"] == pytest.approx(32, rel=1e-6)
    assert found["parameters_ratio"] == found["perplexity_ratio"] == found["top1"] == found["lossless"] == 1
    assert found["replay_kl"] < 1e-9
    assert found["bits_per_value"] == found["measured_bits_per_value"] == 32
    assert found["tokens_per_step"] == found["tokens_per_step_sampled"] == 1
    assert found["memory_bytes"] == plain.program.nbytes + 256 * 2 * 2 * 2 * 16 * 4
    assert found["disk_bytes"] == pytest.approx(  # a report tells seconds, in more digits or fewer
        sum(path.stat().st_size for path in tiny.artefact().iterdir()), rel=1e-3
    )


def test_a_changed_weight_shows(plain: Compiled, text: Text, source: Source) -> None:
    meter = Meter(scaled(plain, 1.05), text, source)
    assert 1e-6 < meter["replay_kl"] < 0.1
    assert meter["top1"] < 1
    assert meter["perplexity_ratio"] != 1


def test_metrics_of_a_source_need_one(plain: Compiled, text: Text) -> None:
    meter = Meter(plain, text)
    for metric in NEEDS_SOURCE:
        with pytest.raises(smelt.SmeltError, match="--source MODEL"):
            meter[metric]
    with pytest.raises(smelt.SmeltError, match="did you mean 'perplexity'"):
        meter["perplxity"]
    assert set(Meter(plain, text).all()) == set(METRICS) - NEEDS_SOURCE


def test_speculation_is_told_from_plain_decoding(drafting: Compiled, text: Text) -> None:
    meter = Meter(drafting, text)
    assert meter.equality.equal == meter.equality.total > 0
    assert meter["tokens_per_step"] > 1


def test_a_cache_that_loses_an_accepted_draft_is_caught(
    drafting: Compiled, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Cache.commit

    def forgetful(self: Cache, accepted: Any) -> None:
        honest(self, [path[:-1] if len(path) > 1 and not self.prefilling else path for path in accepted])

    monkeypatch.setattr(Cache, "commit", forgetful)
    check = of(verify(Meter(drafting, text)))["lossless"]
    assert check.status == "broken" and "differs at token" in check.note


def test_kernels_that_compute_something_else_are_caught(plain: Compiled, text: Text) -> None:
    assert of(verify(Meter(plain, text)))["kernels_kl"].status == "holds"
    wrong = Compiled(plain.program, plain.facts, plain.assets)
    wrong.plan = lower(scaled(plain, 1.5).program)
    assert of(verify(Meter(wrong, text)))["kernels_kl"].status == "broken"


def test_a_promise_on_the_reference_model_is_held_there(reference_path: Any) -> None:
    lm = smelt.compile(reference_path, {"name": "n", "family": "baseline", "does": "x", "steps": ["cache.insert"],
                                        "expect": {"bits_per_value": {"at_most": 1}}})  # fmt: skip
    check = of(verify(Meter(lm, Text(list(range(800)), 4096, 2048))))["bits_per_value"]
    assert check.status == "broken"


def test_bounds_in_signs() -> None:
    assert say(Bound(at_most=4)) == "≤ 4"
    assert say(Bound(at_least=0.5)) == "≥ 0.5"
    assert say(Bound(at_least=0.5, at_most=1)) == "0.5 to 1"
    assert say(Bound(equals=1)) == "= 1"


def test_windows_are_spread_over_the_text() -> None:
    text = Text(list(range(5000)), 4096, 2048)
    assert text.windows[0, 0] == 0 and text.windows[-1, -1] >= 4900
    assert (text.windows.diff(dim=1) == 1).all()
    assert all(prompt == row[: len(prompt)].tolist() for prompt, row in zip(text.prompts, text.windows, strict=False))
    with pytest.raises(smelt.SmeltError, match="too few"):
        Text(list(range(500)), 4096, 2048)


def test_a_large_vocabulary_gets_fewer_windows() -> None:
    assert len(Text(list(range(20000)), 128_000, 2048).windows) < len(Text(list(range(20000)), 4096, 2048).windows)


def test_held_out_text_is_not_calibrated_on() -> None:
    assert not set(HELD_OUT) & set(TRAINING)
    assert len(held_out_text()) > 50_000
    assert sum(map(len, training_texts(200_000))) == 200_000
