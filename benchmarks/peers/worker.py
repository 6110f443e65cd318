"""The benchmark's side of an engine: a process that is asked by JSON lines, and is stopped whenever it is not asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATIENCE = 1800.0  # seconds for one answer: a conversion on two slow cores takes minutes


class Failed(Exception):
    """An engine's last words, in one line."""


class Worker:
    """A `run_*.py` in a Python of its own. Use it in a `with`: its end kills the process if it still lives.

    Between two questions the process is stopped by a signal: threads that spin for work would slow the others.
    """

    def __init__(self, python: Path, script: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.log, self.patience = log, PATIENCE
        with log.open("ab") as errors:
            self._offset = errors.tell()  # the file may hold earlier runs
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()  # reaches a stopped process too
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]  # both are pipes

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer, or Failed with the engine's error or its last line."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self.patience, process.kill)
        timer.start()
        try:
            process.send_signal(signal.SIGCONT)
            process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line.endswith(b"\n"):
            raise Failed(f"no answer to {do} within {self.patience:.0f} s" if late else self._last_words(do))
        if do != "quit":
            process.send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def _last_words(self, do: str) -> str:
        code = self._process.wait()
        with self.log.open("rb") as log:
            log.seek(self._offset)
            lines = log.read().decode(errors="replace").splitlines()  # progress bars too end in a carriage return
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"ended with {code} when asked to {do}"
