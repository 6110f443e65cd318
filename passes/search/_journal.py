"""Finished evaluations in a file that outlives a kill: a line each, which is on the disk before the next begins."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ...ir.errors import SmeltError


class Journal:
    """KL by candidate and row, read from the file at `path` and added to it; without a path it is kept in memory.

    A last line that a kill or a full disk broke off is dropped. `asked`: someone named the place, and is told if it
    cannot be written.
    """

    def __init__(self, path: Path | None, asked: bool) -> None:
        self.known: dict[str, dict[int, float]] = {}
        self._path, self._asked = path, asked
        if path is not None and path.is_file():
            self._read(path)

    def add(self, candidate: str, found: dict[int, float]) -> None:
        """Keep what an evaluation found. Raises SmeltError where the file system refuses a place that was asked for."""
        self.known.setdefault(candidate, {}).update(found)
        if self._path is None:
            return
        line = json.dumps({"candidate": candidate, "kl": found}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                start = file.tell()
                try:
                    file.write(line.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, start)
                    raise
        except OSError as fault:
            path, self._path = self._path, None
            if self._asked:
                raise SmeltError(
                    f"{path}: the search cannot be saved ({fault.strerror}); make room, or name another folder with "
                    "--checkpoints: what was finished is kept"
                ) from fault

    def _read(self, path: Path) -> None:
        held = path.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        if len(whole) < len(held):
            os.truncate(path, len(whole))
        for line in whole.splitlines():
            try:
                told = json.loads(line)
                found = {int(row): float(kl) for row, kl in told["kl"].items()}
                self.known.setdefault(str(told["candidate"]), {}).update(found)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # of another form: it is evaluated again
