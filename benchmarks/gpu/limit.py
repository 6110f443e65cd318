"""A limit in seconds on whatever runs inside."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class OutOfTime(BaseException):
    """The time is over; no handler of ordinary errors may swallow it."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in here once the seconds are over; in other threads than the main one nothing ends early.

    Compiled code is not interrupted: what runs too long there ends when it returns.
    """
    if seconds <= 0:
        raise OutOfTime
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
