"""What a training needs to go on where it was broken off: safetensors, and JSON beside them that says whose."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...ir.errors import SmeltError
from ..base import Checkpoints

FORMAT = 1
SHARE = 20  # saving takes at most one part of so many of the time


@dataclass
class State:
    """A training after `step` updates; `since` and `summed` count and sum the losses behind the last point of `curve`.

    `moments` are the optimizer's of those that ask for gradients, `best` the weights of the lowest held-out loss, after
    `kept` updates. It is `torn` while these do not belong together.
    """

    weights: Mapping[str, torch.Tensor]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    best: dict[str, torch.Tensor]
    curve: list[tuple[int, float | None, float]]
    step: int = 0
    kept: int = 0
    since: int = 0
    summed: float = 0.0
    torn: bool = False

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        found = {f"weights/{name}": value.detach() for name, value in self.weights.items()}
        for name, pair in self.moments.items():
            found |= {f"first/{name}": pair[0], f"second/{name}": pair[1]}
        return found | {f"best/{name}": value for name, value in self.best.items()}


def fresh(weights: Mapping[str, torch.Tensor], held: float) -> State:
    """Before the first update; `held` is the held-out loss of the weights as they are."""
    return State(
        weights,
        {n: (torch.zeros_like(value), torch.zeros_like(value)) for n, value in weights.items() if value.requires_grad},
        {name: value.detach().clone() for name, value in weights.items()},
        [(0, None, held)],
    )


@dataclass
class Checkpoint:
    """Files of one training: `<what>.json`, and the safetensors that it names.

    The JSON is moved to its place when the tensors are written, so that a kill at any time leaves a whole state.
    `asked`: someone named the folder, and is told what is wrong with it.
    """

    folder: Path
    what: str
    identity: Mapping[str, Any]
    asked: bool = True
    saved: float = field(default_factory=time.monotonic)
    took: float = 0.0

    @classmethod
    def of(cls, place: Checkpoints | None, what: str, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Where a place says; None without one."""
        if place is None:
            return None
        plain = json.dumps(identity, sort_keys=True)
        folder = place.folder
        if place.key is not None:
            folder = folder / hashlib.sha256(f"{what} {place.key} {plain}".encode()).hexdigest()[:32]
        return cls(folder, what, json.loads(plain), asked=place.key is None)

    @property
    def file(self) -> Path:
        """The JSON."""
        return self.folder / f"{self.what}.json"

    def due(self) -> bool:
        """Whether a save would take a small share of the time since the last one."""
        return time.monotonic() - self.saved >= SHARE * self.took

    def save(self, state: State) -> None:
        """Write the state in place of the last one. Raises SmeltError where the file system refuses what was asked."""
        begun = time.monotonic()
        name = f"{self.what}-{state.step}.safetensors"
        facts = {"format": FORMAT, "what": self.what, "identity": self.identity, "tensors": name}
        facts |= {key: getattr(state, key) for key in ("step", "kept", "since", "summed", "curve")}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{name}.{os.getpid()}"
            save_file(state.tensors(), draft)
            os.replace(draft, self.folder / name)
            draft.write_text(json.dumps(facts, indent=1), encoding="utf-8")
            os.replace(draft, self.file)
            for old in (*self.folder.glob(f"{self.what}-*.safetensors"), *self.folder.glob(f".{self.what}-*")):
                if old.name != name:
                    old.unlink(missing_ok=True)
        except (OSError, SafetensorError) as fault:
            if self.asked:
                raise SmeltError(f"{self.folder}: the training cannot be saved ({fault})") from fault
            self.took = math.inf  # a cache that cannot be written is none
            return
        self.saved = time.monotonic()
        self.took = self.saved - begun

    def load(self, weights: Mapping[str, torch.Tensor]) -> State | None:
        """The state that was saved, its weights copied into `weights`; None if there is none.

        Raises SmeltError for a state of another training, and for one that cannot be read, if it was asked for.
        """
        if not self.file.is_file():
            return None
        try:
            facts = json.loads(self.file.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}")
            self._check(facts["identity"])
            kept = load_file(self.folder / facts["tensors"])
            state = fresh(weights, 0.0)
            pairs = [(value, kept[name].view(value.shape)) for name, value in state.tensors().items()]
            state.curve = [(int(at), loss, float(held)) for at, loss, held in facts["curve"]]
            state.step, state.kept, state.since = (int(facts[key]) for key in ("step", "kept", "since"))
            state.summed = float(facts["summed"])
        except SmeltError:
            raise
        except Exception as fault:  # of JSON, of safetensors, of the file system
            if not self.asked:
                return None
            raise SmeltError(
                f"{self.file}: the checkpoint cannot be read ({fault}); remove it to train from the start"
            ) from fault
        for value, saved in pairs:
            value.copy_(saved)
        return state

    def _check(self, theirs: Mapping[str, Any]) -> None:
        if theirs == self.identity:
            return
        keys = sorted(theirs.keys() | self.identity.keys())
        other = ", ".join(_difference(key, theirs.get(key), self.identity.get(key)) for key in keys)
        raise SmeltError(
            f"{self.file}: a checkpoint of other {self.what}: {other.strip(', ')}; "
            "name another folder with --checkpoints, or remove it to train from the start"
        )


def _difference(key: str, theirs: Any, ours: Any) -> str:
    """`options.rate is 0.1 there and 0.2 here`; of hashes only that they differ."""
    if theirs == ours:
        return ""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        parts = (_difference(f"{key}.{k}", theirs.get(k), ours.get(k)) for k in sorted(theirs.keys() | ours.keys()))
        return ", ".join(filter(None, parts))
    return f"another {key}" if isinstance(ours, str) else f"{key} is {theirs} there and {ours} here"
