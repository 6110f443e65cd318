"""What a long pass has finished, kept in files, so that a compilation that was broken off goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ir.encoding import parse
from ..ir.errors import SmeltError
from ..ir.program import Program
from ..ir.text import print_program
from ..ir.weight import Weight
from .base import Pass, Samples


@dataclass(frozen=True)
class Finished:
    """Encoded weights by name, in a folder named by what decides them; without a folder nothing is kept.

    `asked`: someone named the place, and is told if it cannot be written.
    """

    folder: Path | None
    asked: bool = False

    @classmethod
    def of(cls, program: Program, options: Pass, samples: Samples) -> Finished:
        """Of a pass with these options on the program as it is now and the calibration text."""
        place = samples.checkpoints
        if place is None:
            return cls(None)
        found = hashlib.sha256()
        for name, value in samples.inputs.items():
            found.update(f"{name} {list(value.shape)}\n".encode() + value.contiguous().numpy().tobytes())
        model = print_program(Program("", program.graph, program.weights))  # no plans, no history
        for part in (model, type(options).__module__, asdict(options), place.key):
            found.update(f"{part}\n".encode())
        return cls(place.folder / found.hexdigest()[:32], asked=place.key is None)

    def get(self, name: str) -> Weight | None:
        """A weight that was finished, if its file is there and whole."""
        if self.folder is None or not (path := self._path(name)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads(file.metadata()["weight"])
                parts = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118  # not a dict
            return Weight(tuple(told["shape"]), parse(told["encoding"]), parts)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, SmeltError):
            return None  # made anew

    def put(self, name: str, weight: Weight) -> None:
        """Keep a weight. Raises SmeltError where the file system refuses a place that was asked for."""
        if self.folder is None:
            return
        path = self._path(name)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        told = {"weight": json.dumps({"shape": weight.shape, "encoding": str(weight.encoding)})}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({part: value.contiguous() for part, value in weight.parts.items()}, draft, metadata=told)
            os.replace(draft, path)
        except (OSError, SafetensorError) as fault:
            with contextlib.suppress(OSError):
                draft.unlink()
            if self.asked:
                raise SmeltError(
                    f"{path}: cannot be written ({fault}); name another folder with --checkpoints"
                ) from fault

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
