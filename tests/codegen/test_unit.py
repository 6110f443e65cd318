"""Units: every piece of work is done once, in an order that respects who reads what, by any number of threads."""

from __future__ import annotations

import multiprocessing
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smelt.codegen import unit
from smelt.codegen.team import Team
from smelt.codegen.unit import ALONE, MEET, SMALL, Call, Function, Unit, call, packed, word

from .mutants import mutant

COUNT = Function.of("count", """\
static void $name(Rank& rank, const int64_t* c) {  // counters, how many
  share(rank, c[2], [&](int64_t i) { __atomic_add_fetch((int32_t*)c[1] + i, 1, __ATOMIC_RELAXED); });
}
""")  # fmt: skip
ADD = Function.of("add", """\
static void $name(Rank& rank, const int64_t* c) {  // x, y, how many, the step: y = x + step
  share(rank, c[3], [&](int64_t i) { ((float*)c[2])[i] = ((const float*)c[1])[i] + (float)real(c[4]); });
}
""")  # fmt: skip
# two pieces that wait for one another, of which the second is late to write; and a reader
LATE = Function.of("late", """\
static void $name(Rank& rank, const int64_t* c) {  // value, two places
  int32_t *value = (int32_t*)c[1], *started = (int32_t*)c[2];
  share(rank, 2, [&](int64_t i) {
    __atomic_store_n(started + i, 1, __ATOMIC_SEQ_CST);
    for (int waited = 0; !__atomic_load_n(started + 1 - i, __ATOMIC_SEQ_CST) && waited < 5000; waited++) usleep(1000);
    if (i == 1) usleep(100000), __atomic_store_n(value, 7, __ATOMIC_SEQ_CST);
  });
}
""")  # fmt: skip
READ = Function.of("read_late", """\
static void $name(Rank& rank, const int64_t* c) {  // value, found
  share(rank, 1, [&](int64_t) { *(int32_t*)c[2] = __atomic_load_n((const int32_t*)c[1], __ATOMIC_SEQ_CST); });
}
""")  # fmt: skip
# the first piece takes long where `late` says so, as if its rank had lost its CPU
LOSE = Function.of("lose", """\
static void $name(Rank& rank, const int64_t* c) {  // late
  share(rank, 2, [&](int64_t i) { if (i == 0 && *(const int32_t*)c[1]) usleep(150000); });
}
""")  # fmt: skip
two_threads = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
COUNTS = (1, 2, 300, 0, 7, 64, 5000, 3)


@pytest.fixture(params=["1", pytest.param("2", marks=two_threads)])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The threads of the team."""
    monkeypatch.setenv("SMELT_THREADS", request.param)
    return int(request.param)


def counters(flags: Callable[[int], dict[str, Any]]) -> tuple[Unit, list[torch.Tensor]]:
    """A unit of calls that count up counters of their own, and the counters with 9 behind the end."""
    held = [torch.zeros(count + 9, dtype=torch.int32) for count in COUNTS]
    calls = [call(COUNT, x, n, writes=[x], **flags(n)) for x, n in zip(held, COUNTS, strict=True)]
    return Unit(calls), held


def exact(held: list[torch.Tensor], runs: int) -> bool:
    return all((x[:n] == runs).all() and not x[n:].any() for x, n in zip(held, COUNTS, strict=True))


@pytest.mark.parametrize(
    "flags",
    [lambda n: {}, lambda n: {"work": n}, lambda n: {"work": n * 100}],
    ids=["unknown", "small", "large"],
)
def test_every_piece_is_done_exactly_once(ranks: int, flags: Callable[[int], dict[str, Any]]) -> None:
    """Over many runs, in which calls of all ranks and of one alone follow one another; and after the ranks slept."""
    made, held = counters(flags)
    for _ in range(2000):
        made()
    assert exact(held, 2000)
    for _ in range(5):
        time.sleep(0.02)
        made()
        assert len(made.timed()) == len(COUNTS)
    assert exact(held, 2010)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("end = rank.base + count;", "end = count;"),
        ("rank.ticket < end;", "rank.ticket <= end;"),
        ("each(rank.ticket - rank.base)", "each(rank.ticket - rank.base + 1)"),
    ],
)
def test_the_count_catches_wrong_tickets(right: str, wrong: str) -> None:
    with mutant(right, wrong):
        made, held = counters(lambda n: {})
    made()
    assert not exact(held, 1)


def chained(runs: int) -> tuple[Unit, torch.Tensor, float]:
    """A unit in which each call reads what the one before wrote; calls of a few numbers are small."""
    buffers = [torch.zeros(5000) for _ in range(4)]
    calls, total = [], 0.0
    for at in range(24):
        x, y = buffers[at % 4], buffers[(at + 1) % 4]
        calls.append(call(ADD, x, y, 5000, float(at), writes=[y], work=1 if at % 5 == 0 else 1 << 20))
        total += at
    return Unit(calls), buffers[0], total * runs


def test_what_is_read_was_written(ranks: int) -> None:
    made, last, total = chained(50)
    assert {each.words[0] for each in made.calls} == {ALONE, MEET, 0}
    for _ in range(50):
        made()
    assert (last == total).all()


@two_threads
@pytest.mark.parametrize("meets", [True, False])
def test_a_missing_meeting_is_seen(meets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever did the quick piece reads at once; with a meeting it waits for the late one.

    Teams of its own: the one of this process may have left a rank out, and then nobody reads too early. Where the quick
    one loses its CPU for as long, it is tried again.
    """
    value, places, found = (torch.zeros(2, dtype=torch.int32) for _ in range(3))
    made = Unit([call(LATE, value, places, writes=[value, places]), call(READ, value, found, writes=[found])])
    assert [each.words[0] for each in made.calls] == [0, MEET]
    if not meets:
        made.calls[1].words[0] = 0
    seen = set()
    for _ in range(2 if meets else 8):
        pair = Team(2)
        monkeypatch.setattr(unit, "team", lambda pair=pair: pair)
        for each in (value, places, found):
            each.zero_()
        made()
        assert value[0] == 7
        seen.add(int(found[0]))
        if 0 in seen:
            break
    assert seen == {7} if meets else 0 in seen


def flags(*calls: tuple[str, str, bool]) -> list[int]:
    """The flags of calls given as (letters read, letters written, small)."""
    made = [Call(Function("f", ""), packed(()), frozenset(r), frozenset(w), small) for r, w, small in calls]
    return unit._flags(made)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("x", "a", False), ("a", "b", False)], [0, MEET]),  # reads what was written
        ([("a", "b", False), ("x", "a", False)], [0, MEET]),  # writes what was read
        ([("x", "a", False), ("y", "a", False)], [0, MEET]),  # writes what was written
        ([("x", "a", False), ("x", "b", False), ("x", "c", False)], [0, 0, 0]),
        ([("x", "a", False), ("a", "b", False), ("a", "c", False)], [0, MEET, 0]),  # a was met for
        ([("x", "a", False), ("x", "b", False), ("a", "c", False), ("b", "d", False)], [0, 0, MEET, 0]),
        ([("x", "a", False), ("a", "b", True), ("b", "c", False)], [0, ALONE, 0]),  # all meet around what one does
        ([("x", "a", True), ("a", "b", True), ("b", "c", True)], [ALONE, ALONE, ALONE]),
        ([("x", "a", False), ("y", "b", True), ("c", "a", False), ("a", "d", False)], [0, ALONE, 0, MEET]),
        ([("a", "a", False), ("a", "a", False)], [0, MEET]),
    ],
)
def test_ranks_meet_where_a_value_passes(calls: list[tuple[str, str, bool]], expected: list[int]) -> None:
    assert flags(*calls) == expected


def test_a_call_knows_what_it_touches() -> None:
    x, y = torch.zeros(8), torch.zeros(4, 4)
    made = call(ADD, x[2:], y[1], 4, 0.5, writes=[y[1]], work=SMALL)
    assert made.reads == {x.data_ptr()} and made.writes == {y.data_ptr()} and made.small
    assert not call(ADD, x, y, 4, 0.5, writes=[y], work=SMALL + 1).small and not call(ADD, x, y, writes=[]).small
    assert list(made.words) == [0, x.data_ptr() + 8, y.data_ptr() + 16, 4, struct.unpack("q", struct.pack("d", 0.5))[0]]
    made()
    assert y[1].tolist() == [0.5] * 4 and not y[0].any()


def test_words_are_numbers_or_addresses() -> None:
    x = torch.zeros(3)
    assert [word(None), word(7), word(-1), word(True), word(x)] == [0, 7, -1, 1, x.data_ptr()]
    assert word(-0.0) == -(1 << 63)


def test_refresh_comes_before_and_check_behind() -> None:
    x, y, seen = torch.zeros(4), torch.zeros(4), []
    made = call(ADD, x, y, 4, 1.0, writes=[y])
    made.refresh = lambda: (x.fill_(2.0), seen.append(float(y[0])))  # type: ignore[assignment,func-returns-value]
    made.check = lambda: seen.append(float(y[0]))
    Unit([made, call(ADD, y, x, 4, 0.0, writes=[x])])()
    assert seen == [0.0, 3.0] and x.tolist() == [3.0] * 4


def test_a_text_stands_once_and_calls_in_order() -> None:
    shared = "static const int answer = 42;\n"
    first, second = (
        Function.of(name, "static void $name(Rank&, const int64_t*) {}\n", (shared,)) for name in ("a b", "c")
    )
    text = unit.source([first, second, first])
    assert text.count(shared) == 1 and text.count(first.text) == 1
    assert f"{first.name},\n  {second.name},\n  {first.name}\n}};" in text and first.name.startswith("a_b_")


def test_another_compiler_or_cpu_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    calls = [call(ADD, x, y, 4, 1.0, writes=[y])]
    first, again = Unit(calls), Unit(calls)
    monkeypatch.setenv("SMELT_MARCH", "native -DOTHER")
    other = Unit(calls)
    assert first._step is again._step and other._step is not first._step


def _forked(queue: Any) -> None:
    made, held = counters(lambda n: {"work": n * 100})
    for _ in range(100):
        made()
    queue.put(exact(held, 100))


def test_a_forked_process_has_a_team_of_its_own(ranks: int) -> None:
    made, held = counters(lambda n: {})
    made()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60)
    finally:
        child.join(5)
        child.kill()
    made()
    assert exact(held, 2)


def test_two_python_threads_take_turns(ranks: int) -> None:
    results: list[bool] = []

    def work() -> None:
        made, held = counters(lambda n: {})
        chain, last, total = chained(300)
        for _ in range(300):
            made()
            chain()
        results.append(exact(held, 300) and bool((last == total).all()))

    both = [threading.Thread(target=work) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert results == [True, True]


def test_more_ranks_than_cpus_are_only_slower() -> None:
    made, held = counters(lambda n: {"work": n * 100})
    many = Team(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "team", lambda: many)
        for _ in range(20):
            made()
    assert exact(held, 20)


def test_a_rank_that_comes_late_again_and_again_is_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is tried again: soon at first, then after ever longer pauses while it does not get better."""
    pair, late = Team(2), torch.ones(1, dtype=torch.int32)
    monkeypatch.setattr(unit, "team", lambda: pair)
    with mutant("LATE = 1000000,", "LATE = 100000000,"):  # what another process of a test run takes is not so long
        made = Unit([call(LOSE, late, writes=[])])

    def until(ranks: int) -> int:
        """Runs until the next job has so many ranks."""
        for run in range(2000):
            if pair.ranks == ranks:
                return run
            made()
        raise AssertionError(f"never had {ranks} ranks")

    assert pair.ranks == 2
    assert 4 <= until(1) <= 40  # some runs in which nobody was seen to wait are allowed for
    late[0] = 0
    first = until(2)
    late[0] = 1
    until(1)
    late[0] = 0
    assert until(2) == 2 * first


def test_one_late_rank_now_and_then_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, late = Team(2), torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(unit, "team", lambda: pair)
    with mutant("LATE = 1000000,", "LATE = 100000000,"):  # what another process of a test run takes is not so long
        made = Unit([call(LOSE, late, writes=[])])
    for run in range(100):
        late[0] = run % 20 == 0
        made()
        assert pair.ranks == 2
