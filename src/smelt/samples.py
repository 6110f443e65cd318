"""What a caller gives to calibrate on or to train on: texts as checked tokens, or checked values of other inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from . import kept
from .ir.errors import SmeltError
from .passes import Samples
from .passes.base import Checkpoints
from .runtime.text import Tokenizer

LENGTH = 256  # tokens of one sequence, fewer where the model's context ends before
LEAST = 512  # tokens below which statistics mean nothing

Texts: TypeAlias = str | Path | Sequence[str] | torch.Tensor
Inputs: TypeAlias = Mapping[str, torch.Tensor]


def samples(
    calibration: Texts | Inputs | None,
    train: Texts | None,
    folder: Path | None,
    facts: Mapping[str, Any],
    checkpoints: str | Path | None = None,
) -> Samples | None:
    """Both texts as tokens, each standing in for the other where that is missing; None without any.

    `folder` holds the tokenizer, `facts` are the program's. Trainings leave their state in `checkpoints`, or in the
    cache folder, if anything is to be kept there. Raises SmeltError for samples that cannot be used.
    """
    observed: torch.Tensor | Inputs | None
    if isinstance(calibration, Mapping):
        observed = _inputs(calibration, facts)
    else:
        observed = None if calibration is None else _tokens(calibration, folder, facts, "calibration")
    learned = None if train is None else _tokens(train, folder, facts, "train")
    given = learned if observed is None else observed
    place = Checkpoints(kept.trainings(), kept.code_digest()) if kept.room() else None
    if checkpoints is not None:
        place = Checkpoints(Path(checkpoints))
    return None if given is None else Samples(given, training=learned, checkpoints=place)


def _inputs(given: Inputs, facts: Mapping[str, Any]) -> Inputs:
    """Values of inputs, each as the program reads it."""
    told = facts.get("inputs") or {}
    rows = {name: len(value) for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim()}
    if set(given) != set(rows) or not given or len(set(rows.values())) > 1 or not all(rows.values()):
        raise SmeltError(f"calibration: every input must be a tensor of as many rows, at least one; they have {rows}")
    if missing := [name for name, how in told.items() if name not in given and not how.get("optional")]:
        raise SmeltError(f"calibration: the model's input '{missing[0]}' is missing; give {', '.join(told)}")
    for name, value in given.items():
        if name not in told and name != "tokens":
            raise SmeltError(f"calibration: the model has no input '{name}'; it reads {', '.join(told) or 'tokens'}")
        wanted = told.get(name, {}).get("shape", ["B", "T"])
        sizes = [size if isinstance(want, str) else want for want, size in zip(wanted, value.shape, strict=False)]
        if len(wanted) != value.dim() or sizes != list(value.shape):
            raise SmeltError(f"calibration: '{name}' must be [{', '.join(map(str, wanted))}], not {list(value.shape)}")
        if not bool(value.isfinite().all()):
            raise SmeltError(f"calibration: '{name}' has values that are not finite")
    return {name: value.detach().cpu() for name, value in given.items()}


def _tokens(given: Texts, folder: Path | None, facts: Mapping[str, Any], role: str) -> torch.Tensor:
    """int64 [N, T]; `role` is how the caller calls the text."""
    if isinstance(given, torch.Tensor):
        return _checked(given, facts, role)
    if isinstance(given, str | Path):
        texts, place = [_read(Path(given), role)], str(given)
    else:
        texts, place = list(given), role
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise SmeltError(f"{place}: {strange[0]!r} is not text; give texts, a file, or tokens as a tensor [N, T]")
    if folder is None:
        raise SmeltError(f"{place}: text needs the model's tokenizer; pass tokenizer=FOLDER, or tokens int64 [N, T]")
    encode = Tokenizer(folder).encode
    tokens = [token for text in texts for token in encode(text)]
    if len(tokens) < LEAST:
        verb = "train" if role == "train" else "calibrate"
        raise SmeltError(f"{place}: {len(tokens)} tokens are too few to {verb} on; give at least {LEAST}")
    length = min(LENGTH, int(facts.get("context") or LENGTH))
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)


def _checked(given: torch.Tensor, facts: Mapping[str, Any], role: str) -> torch.Tensor:
    """Tokens of the caller."""
    if given.dim() != 2 or given.is_floating_point() or given.dtype is torch.bool or not given.numel():
        raise SmeltError(f"{role}: tokens must be whole numbers [N, T], not {given.dtype} {list(given.shape)}")
    low, high, words = int(given.min()), int(given.max()), int(facts.get("vocabulary") or 1 << 62)
    if low < 0 or high >= words:
        raise SmeltError(f"{role}: token {low if low < 0 else high} is not in the vocabulary of {words}")
    context = int(facts.get("context") or given.shape[1])
    if given.shape[1] > context:
        raise SmeltError(f"{role}: sequences of {given.shape[1]} tokens exceed the model's context of {context}")
    return given.detach().cpu().long()


def _read(path: Path, role: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise SmeltError(f"{path}: cannot be read ({fault.strerror})") from fault
    except UnicodeDecodeError as fault:
        raise SmeltError(f"{path}: not UTF-8 text (byte {fault.start})") from fault
    if not text.strip():
        raise SmeltError(f"{path}: the {'training' if role == 'train' else 'calibration'} file is empty")
    return text
