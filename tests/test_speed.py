"""Contestants take turns, and the summary of their timings is the one that is stated."""

from collections.abc import Sequence

import pytest

from smelt.speed import Runner, Spread, Timing, decode_rate, per_step, prefill_rate, race, ratio, spread


def test_who_goes_first_changes() -> None:
    calls: list[tuple[str, int]] = []

    def runner(name: str) -> Runner:
        def run(prompt: Sequence[int], new: int) -> Timing:
            calls.append((name, new))
            return Timing(len(prompt), 1.0, 2.0, new, new)

        return run

    timings = race({"a": runner("a"), "b": runner("b")}, [[1, 2], [3, 4]], new=8, rounds=2)
    warm_up, asked = calls[:2], calls[2:]
    assert warm_up == [("a", 4), ("b", 4)]
    assert [name for name, _ in asked] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(taken) for name, taken in timings.items()} == {"a": 4, "b": 4}


def test_rates() -> None:
    fast, slow = Timing(10, 0.5, 2.0, 20, 10), Timing(10, 1.0, 4.0, 20, 20)
    assert decode_rate([fast]).median == 10 and prefill_rate([slow]).median == 10
    assert per_step([fast, slow]) == pytest.approx(40 / 30)
    assert ratio([fast, fast], [slow, fast]) == Spread(1.25, 1.5, 1.75)


def test_quartiles() -> None:
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)
