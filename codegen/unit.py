"""The generated translation unit of a step: its kernels, and the order in which one call runs them.

A kernel is a C++ function `void name(Rank&, const int64_t* c)`; what it works on, it reads from its words `c`:
addresses, sizes, and numbers as the bits of a double. So one source serves every batch, number of tokens and set of
buffers, and is compiled once. Where ranks must meet is decided when buffers are known, and is a word too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .build import build
from .compiler import Compiler, find, flags
from .printers.prelude import PRELUDE
from .team import HEADER, team

SMALL = 1 << 14  # numbers read and written by a call that one rank does while the others wait: some 3 us
ALONE, MEET = 1, 2


@dataclass(frozen=True)
class Function:
    """A generated kernel: its C++ name, its text, the texts that it needs before it, and what people call it."""

    name: str
    text: str
    needs: tuple[str, ...] = ()
    label: str = ""

    @classmethod
    def of(cls, label: str, text: str, needs: tuple[str, ...] = ()) -> Function:
        """A function whose name holds `label` and a hash of the text, in which `$name` stands for the name."""
        name = "".join(c if c.isalnum() else "_" for c in label) + "_" + hashlib.sha256(text.encode()).hexdigest()[:8]
        return cls(name, text.replace("$name", name), needs, label)

    @property
    def source(self) -> str:
        """The text with all that it needs but what every unit starts with."""
        return "\n".join((*self.needs, self.text))


@dataclass
class Call:
    """A kernel on fixed addresses. `reads` and `writes` name what it touches: addresses of storages, or any keys.

    `small`: one rank does it alone. `refresh` sets words that may change from step to step, and where it is `steady`
    none but addresses of a cache and its step; `check` raises after a step whose words tell of bad input. Calling it
    runs it by itself.
    """

    function: Function
    words: ctypes.Array[ctypes.c_int64]
    reads: frozenset[Any]
    writes: frozenset[Any]
    small: bool = False
    keeps: tuple[Any, ...] = ()
    refresh: Callable[[], None] | None = None
    steady: bool = False
    check: Callable[[], None] | None = None
    node: str = ""
    nbytes: int = 0
    _alone: Unit | None = field(default=None, repr=False)

    def __call__(self) -> None:
        if self._alone is None:
            self._alone = Unit([self])
        self._alone()


def call(function: Function, *words: Any, writes: Sequence[torch.Tensor], work: int = 1 << 62, **options: Any) -> Call:
    """A call with these words behind the flags: ints, floats, tensors by address, None as null.

    What is not written is read. `work`: numbers that the call touches.
    """
    keeps = tuple(word for word in words if isinstance(word, torch.Tensor))
    written = frozenset(t.untyped_storage().data_ptr() for t in writes)
    read = frozenset(t.untyped_storage().data_ptr() for t in keeps) - written
    return Call(function, packed(words), read, written, work <= SMALL, keeps, **options)


def packed(words: Sequence[Any]) -> ctypes.Array[ctypes.c_int64]:
    """Words as a kernel reads them, behind one for the flags."""
    return (ctypes.c_int64 * (len(words) + 1))(0, *map(word, words))


def word(value: Any) -> int:
    """One number or address as 64 bits."""
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(struct.unpack("q", struct.pack("d", value))[0]) if isinstance(value, float) else int(value)


class Unit:
    """Calls in order as one: built together, run by the team, nothing allocated."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self.source = source([call.function for call in calls])
        for each, mark in zip(calls, _flags(calls), strict=True):
            each.words[0] = mark
        library = _library(self.source, find(), flags())
        self._step, self._timed = library.step, library.timed
        self._pointers = (ctypes.c_void_p * len(calls))(*(ctypes.addressof(c.words) for c in calls))
        self._refreshes = [c.refresh for c in calls if c.refresh is not None]
        self._unsteady = [c.refresh for c in calls if c.refresh is not None and not c.steady]
        self._checks = [c.check for c in calls if c.check is not None]

    def __call__(self, moved: bool = True) -> None:
        """Run all calls. `moved`: whether the cache or the step lie elsewhere than in the last one."""
        for refresh in self._refreshes if moved else self._unsteady:
            refresh()
        self._run(self._step, self._pointers)

    def again(self) -> None:
        """Run all calls with the words of the last time."""
        self._run(self._step, self._pointers)

    def timed(self) -> list[float]:
        """Run all calls with a meeting after each; seconds that each took."""
        taken = (ctypes.c_int64 * len(self.calls))()
        for refresh in self._refreshes:
            refresh()
        self._run(self._timed, self._pointers, taken)
        return [nanoseconds * 1e-9 for nanoseconds in taken]

    def _run(self, function: Any, *arguments: Any) -> None:
        ranks = team()
        with ranks.lock:
            function(ranks.address, *arguments)
        for check in self._checks:
            check()


def source(functions: Sequence[Function]) -> str:
    """The C++ of a unit that runs these functions in this order."""
    texts: dict[str, None] = {PRELUDE: None, HEADER: None, _HELPERS: None}
    for function in functions:
        texts.update(dict.fromkeys((*function.needs, function.text)))
    sequence = ",\n  ".join(function.name for function in functions)
    return "\n".join([*texts, _STEP.replace("$sequence", sequence).replace("$count", str(len(functions)))])


@functools.cache
def _library(text: str, compiler: Compiler, options: tuple[str, ...]) -> ctypes.CDLL:
    library = build(text, "step")
    for function, count in ((library.step, 2), (library.timed, 3)):
        function.argtypes, function.restype = [ctypes.c_void_p] * count, None
    return library


def _flags(calls: Sequence[Call]) -> list[int]:
    """Which calls one rank makes alone, and before which all ranks must meet since they touch what was written."""
    flags = []
    read: set[Any] = set()
    written: set[Any] = set()
    for each in calls:
        waits = bool(each.writes & (read | written) or each.reads & written)
        if each.small or waits:
            read, written = set(), set()
        if not each.small:
            read |= each.reads
            written |= each.writes
        flags.append(ALONE if each.small else MEET if waits else 0)
    return flags


_HELPERS = """\
static inline double real(int64_t word) {
  double x;
  memcpy(&x, &word, sizeof x);
  return x;
}
"""

_STEP = """\
typedef void (*Kernel)(Rank&, const int64_t*);
static const Kernel sequence[] = {
  $sequence
};
constexpr int64_t COUNT = $count, ALONE = 1, MEET = 2;

static void by_itself(int64_t first, int64_t end, const int64_t* const* calls) {
  for (int64_t i = first; i < end; i++) {
    Team team = {};
    team.size = 1;
    Rank rank = {&team, 0, draw(&team), 0};
    sequence[i](rank, calls[i]);
  }
}
static void steps(Rank& rank, const int64_t* const* calls) {
  for (int64_t i = 0; i < COUNT;) {
    int64_t end = i;
    while (end < COUNT && calls[end][0] & ALONE) end++;
    if (end > i) meet(rank, [&] { by_itself(i, end, calls); });
    else if (calls[i][0] & MEET) meet(rank);
    if (end < COUNT) sequence[end](rank, calls[end]);
    i = end + 1;
  }
}
static void timed_steps(Rank& rank, const int64_t* const* calls) {
  int64_t* taken = (int64_t*)calls[COUNT];
  struct timespec before, after;
  meet(rank);
  clock_gettime(CLOCK_MONOTONIC, &before);
  for (int64_t i = 0; i < COUNT; i++) {
    if (calls[i][0] & ALONE) meet(rank, [&] { by_itself(i, i + 1, calls); });
    else sequence[i](rank, calls[i]);
    meet(rank);
    clock_gettime(CLOCK_MONOTONIC, &after);
    if (!rank.number) taken[i] = (after.tv_sec - before.tv_sec) * 1000000000 + after.tv_nsec - before.tv_nsec;
    before = after;
  }
}
extern "C" void step(Team* team, const int64_t* const* calls) { run(team, steps, calls); }
extern "C" void timed(Team* team, const int64_t* const* calls, int64_t* taken) {
  const int64_t* all[COUNT + 1];
  for (int64_t i = 0; i < COUNT; i++) all[i] = calls[i];
  all[COUNT] = taken;
  run(team, timed_steps, all);
}
"""
