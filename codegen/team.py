"""The threads that run a step: one team a process, woken once a step, whose ranks walk the same kernels side by side.

A kernel's work is cut into units that ranks draw as tickets, so that a rank which the system interrupts delays one unit
and not a share. Tickets are numbered through the whole step: who has drawn one beyond a kernel's last keeps it for the
next. Where a kernel reads what another wrote, the ranks meet; the last one to arrive does what is too small to share.

A rank whose CPU another process takes keeps all others waiting. Where that happens again and again, steps are made with
one rank less for a while.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading

from .build import build, threads

HEADER = r"""
#ifndef SMELT_TEAM
#define SMELT_TEAM
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {
struct Rank;
struct Team {  // shared by all libraries of a process, which are built from this text
  int64_t size, most;  // ranks of this job, and threads
  int64_t waited, trouble, rest, penalty;
  void (*body)(Rank&, const int64_t* const*);
  const int64_t* const* calls;
  alignas(64) uint32_t jobs;  // a count, and in the low byte the ranks of the newest
  uint32_t sleepers;
  alignas(64) int64_t tickets;
  alignas(64) uint32_t meetings;
  alignas(64) int64_t arrived;
};
struct Rank {
  Team* team;
  int64_t number, ticket, base;
};

// Pauses before a waiting rank sleeps: inside of a step 50 to 150 us, about what a wake-up costs; between the steps of
// a generation some 1 ms, which the choice of a token does not take.
constexpr int PATIENCE = 4000, BETWEEN = 25000;
// Who waits for a rank that long (ns) may wait for one that does not run, or for a large unit. Where such waits take a
// quarter of a job it was late. So many late jobs, less those that were not, are trouble; then so many jobs are done
// with one rank less, and more of them each time that did not help.
constexpr int64_t LATE = 1000000, TROUBLE = 4, REST = 64, MOST_REST = 1024;

static inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
static inline void await(Team* team, uint32_t* word, uint32_t old, int patience) {  // until the word is another
  for (int i = 0; __atomic_load_n(word, __ATOMIC_ACQUIRE) == old; i++) {
    if (i < patience) {
      pause();
      continue;
    }
    __atomic_add_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, 0, 0, 0);
    __atomic_sub_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
  }
}
static inline void wake(Team* team, uint32_t* word) {
  if (!__atomic_load_n(&team->sleepers, __ATOMIC_SEQ_CST)) return;
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, 0, 0, 0);
}

static inline int64_t clock_now() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

// All ranks come to here; the last runs `alone` before any goes on.
template <class F> static inline void meet(Rank& rank, F alone) {
  Team* team = rank.team;
  if (team->size == 1) return alone();
  const uint32_t before = __atomic_load_n(&team->meetings, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) < team->size) {
    const int64_t from = clock_now();
    await(team, &team->meetings, before, PATIENCE);
    const int64_t waited = clock_now() - from;
    if (waited > LATE) __atomic_fetch_add(&team->waited, waited, __ATOMIC_RELAXED);
    return;
  }
  alone();
  __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
  __atomic_add_fetch(&team->meetings, 1, __ATOMIC_SEQ_CST);
  wake(team, &team->meetings);
}
static inline void meet(Rank& rank) {
  meet(rank, [] {});
}

static inline int64_t draw(Team* team) {
  return team->size == 1 ? team->tickets++ : __atomic_fetch_add(&team->tickets, 1, __ATOMIC_RELAXED);
}
// The ranks do each(0) to each(count - 1) between them, in no order.
template <class F> static inline void share(Rank& rank, int64_t count, F each) {
  const int64_t end = rank.base + count;
  for (; rank.ticket < end; rank.ticket = draw(rank.team)) each(rank.ticket - rank.base);
  rank.base = end;
}

static inline void enter(Team* team, int64_t number) {
  Rank rank = {team, number, draw(team), 0};
  team->body(rank, team->calls);
  meet(rank);
}
// How many ranks the next job has, after one that took so long.
static inline void adapt(Team* team, int64_t taken) {
  const bool late = team->waited * 4 > taken;
  team->waited = 0;
  if (team->size < team->most && --team->rest <= 0) team->size = team->most, team->trouble = 0;
  if (team->size == 1) return;
  if (!late) {
    if (team->trouble > -REST) team->trouble--;  // a long time without: what was is forgotten
    else team->penalty = REST;
    return;
  }
  team->trouble = (team->trouble > 0 ? team->trouble : 0) + 2;
  if (team->trouble < 2 * TROUBLE) return;
  team->size--, team->trouble = 0, team->rest = team->penalty;
  if (team->penalty < MOST_REST) team->penalty *= 2;
}
// The calling thread is rank 0; returns when all are done.
static inline void run(Team* team, void (*body)(Rank&, const int64_t* const*), const int64_t* const* calls) {
  team->body = body, team->calls = calls, team->tickets = 0;
  if (team->size > 1) {
    const uint32_t count = __atomic_load_n(&team->jobs, __ATOMIC_RELAXED) >> 8;
    __atomic_store_n(&team->jobs, (count + 1) << 8 | (uint32_t)team->size, __ATOMIC_SEQ_CST);
    wake(team, &team->jobs);
  }
  const int64_t from = clock_now();
  enter(team, 0);
  adapt(team, clock_now() - from);
}
}  // namespace
#endif
"""

SOURCE = (
    "#include <stdint.h>\n#if defined(__x86_64__)\n#include <immintrin.h>\n#endif\n"
    + HEADER
    + r"""
#include <stdlib.h>
#include <pthread.h>
struct Seat { Team* team; int64_t number; };
static void* wait_for_jobs(void* place) {
  const Seat seat = *(Seat*)place;
  free(place);
  for (uint32_t job = 0;;) {
    await(seat.team, &seat.team->jobs, job, BETWEEN);
    job = __atomic_load_n(&seat.team->jobs, __ATOMIC_ACQUIRE);
    if (seat.number < (job & 255)) enter(seat.team, seat.number);
  }
}
extern "C" Team* make_team(int64_t size) {
  Team* team = (Team*)aligned_alloc(64, (sizeof(Team) + 63) / 64 * 64);
  *team = Team{};
  team->size = 1, team->penalty = REST;
  for (int64_t number = 1; number < size && number < 255; number++) {
    pthread_t thread;
    Seat* seat = (Seat*)malloc(sizeof(Seat));
    *seat = {team, team->size};
    if (pthread_create(&thread, 0, wait_for_jobs, seat)) {  // fewer threads are slower, not wrong
      free(seat);
      break;
    }
    pthread_detach(thread);
    team->size++;
  }
  team->most = team->size;
  return team;
}
"""
)


class Team:
    """Threads of this process; one job at a time."""

    def __init__(self, size: int) -> None:
        make = build(SOURCE, "team").make_team
        make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_int64]
        self.address, self.lock = make(size), threading.Lock()

    @property
    def ranks(self) -> int:
        """Of the next job: as many as threads, fewer for a while where some of them came late again and again."""
        return ctypes.c_int64.from_address(self.address).value


def team() -> Team:
    """The team of this process, of as many threads as it may use; a process that was forked makes its own."""
    return _team(os.getpid(), threads())


@functools.cache
def _team(process: int, size: int) -> Team:
    return Team(size)
