"""Texts that a caller gives to calibrate on or to train on, as checked tokens."""

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


def samples(
    calibration: Texts | None,
    train: Texts | None,
    folder: Path | None,
    facts: Mapping[str, Any],
    checkpoints: str | Path | None = None,
) -> Samples | None:
    """Both texts as tokens, each standing in for the other where that is missing; None without any.

    `folder` holds the tokenizer, `facts` are the program's. Trainings leave their state in `checkpoints`, or in the
    cache folder, if anything is to be kept there. Raises SmeltError for a text that cannot be used.
    """
    observed = None if calibration is None else _tokens(calibration, folder, facts, "calibration")
    learned = None if train is None else _tokens(train, folder, facts, "train")
    tokens = learned if observed is None else observed
    place = Checkpoints(kept.trainings(), kept.code_digest()) if kept.room() else None
    if checkpoints is not None:
        place = Checkpoints(Path(checkpoints))
    return None if tokens is None else Samples(tokens, training=learned, checkpoints=place)


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
