"""An engine's side of the side-by-side benchmark: JSON lines in, JSON lines out, asleep in between.

Every `run_*.py` beside this file calls `serve` in a Python of its engine's own, so this file needs nothing but Python.

{"do": "convert", "checkpoint": P, "out": P, "variant": V, "threads": N}  gives  {"seconds": S, "bytes": B, ...}
{"do": "load", "model": P, "variant": V, "threads": N, "context": N}      gives  {"seconds": S, "versions": {...}, ...}
{"do": "run", "tokens": [...], "new": N}     gives  {"prefill_s": S, "decode_s": S, "cpu_s": S, "tokens": [...]}
{"do": "quit"}                               gives  {"peak_bytes": B}, and the process ends

`prefill_s` lasts until the first new token is known, `decode_s` from there to the last; `cpu_s` is what all threads
used. A failure answers {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Convert = Callable[[Path, Path, str, int], Mapping[str, Any]]  # checkpoint, out, variant, threads; returns facts
Run = Callable[[Sequence[int], int], Mapping[str, Any]]  # tokens, new; returns what Clock.reply does
Load = Callable[[Path, str, int, int], tuple[Run, Mapping[str, Any]]]  # model, variant, threads, context; with facts


class Clock:
    """Times one request: made when it starts, told each token as soon as it is known."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._start = self._first = self._last = time.perf_counter()

    def tick(self, token: int) -> None:
        """One more token."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens.append(int(token))

    def reply(self) -> dict[str, Any]:
        """Seconds up to the first token, seconds behind it, and the tokens."""
        return {"prefill_s": self._first - self._start, "decode_s": self._last - self._first, "tokens": self.tokens}


def serve(convert: Convert, load: Load, packages: Sequence[str]) -> None:
    """Answer requests until `quit` or the end of the input. `packages`: whose versions are told."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not come between the replies
    run: Run | None = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        start = time.perf_counter()
        reply: dict[str, Any]
        try:
            if do == "convert":
                facts = convert(
                    Path(request["checkpoint"]), Path(request["out"]), request["variant"], request["threads"]
                )
                reply = {"seconds": time.perf_counter() - start, "peak_bytes": peak(), **facts}
            elif do == "load":
                run, facts = load(Path(request["model"]), request["variant"], request["threads"], request["context"])
                reply = {"seconds": time.perf_counter() - start, "versions": {p: version(p) for p in packages}, **facts}
            elif do == "run":
                if run is None:
                    raise RuntimeError("run comes after load")
                used = time.process_time()
                reply = dict(run(request["tokens"], request["new"]))
                reply["cpu_s"] = time.process_time() - used
            elif do == "quit":
                reply = {"peak_bytes": peak()}
            else:
                raise RuntimeError(f"unknown request {do}")
        except Exception as fault:  # whatever an engine raises is its result, and other engines go on
            traceback.print_exc()
            reply = {"error": (str(fault).strip() or type(fault).__name__).splitlines()[-1]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if do == "quit":
            return


def peak() -> int:
    """Most resident bytes of this process so far; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)
