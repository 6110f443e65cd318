"""Texts to calibrate on and to measure on: files that every Python has on disk, and windows of held-out tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from .ir.errors import SmeltError

PREFIX, LENGTH = 128, 384  # tokens of a window's prompt, and of the whole window
FAR, FAR_WINDOWS = 512, 12  # tokens of long windows, of which three quarters are the prompt; and how many
WINDOWS = 16
LOGITS = 1 << 27  # values that the logits of all windows may have; a large vocabulary gets fewer windows
PROMPTS, PROMPT = 6, 64  # prompts of requests, and their tokens

# The reference model learned from the rest of the standard library; these files were kept from it.
HELD_OUT = (
    "multiprocessing/connection.py",
    "zoneinfo/_zoneinfo.py",
    "ctypes/__init__.py",
    "concurrent/futures/thread.py",
    "multiprocessing/sharedctypes.py",
    "codeop.py",
    "zoneinfo/_tzpath.py",
    "json/scanner.py",
    "importlib/metadata/_itertools.py",
)
TRAINING = (
    "argparse.py",
    "heapq.py",
    "collections/__init__.py",
    "json/decoder.py",
    "logging/__init__.py",
    "textwrap.py",
    "datetime.py",
    "shutil.py",
    "subprocess.py",
    "statistics.py",
    "unittest/case.py",
    "functools.py",
    "http/client.py",
    "random.py",
    "inspect.py",
    "urllib/parse.py",
    "threading.py",
    "fractions.py",
    "dataclasses.py",
    "typing.py",
    "ipaddress.py",
    "configparser.py",
    "tarfile.py",
    "difflib.py",
    "pickle.py",
    "mailbox.py",
    "_pydecimal.py",
    "optparse.py",
)


class Text:
    """Held-out text as tokens: windows int64 [N, LENGTH] that are spread over it, and the prompts of requests.

    `far` int64 [N, FAR]: longer windows, in which what a cache does to old tokens can be seen.
    """

    def __init__(self, tokens: Sequence[int], vocabulary: int, context: int) -> None:
        """Raises SmeltError if there are too few tokens for two windows."""
        length = min(LENGTH, context)
        most = max(1, LOGITS // (vocabulary * length))
        count = min(WINDOWS, most, len(tokens) // length)
        if count < min(2, most):
            raise SmeltError(
                f"held-out text: {len(tokens)} tokens are too few to measure on; give at least {2 * length}"
            )
        stride = (len(tokens) - length) // max(1, count - 1)
        self.windows = torch.tensor([tokens[i * stride : i * stride + length] for i in range(count)])
        self.prefix = min(PREFIX, length // 2)
        far = min(FAR, context, len(tokens))
        rows = max(1, min(FAR_WINDOWS, len(tokens) // far))
        stride = (len(tokens) - far) // max(1, rows - 1)
        self.far = torch.tensor([tokens[i * stride : i * stride + far] for i in range(rows)])
        self.far_prefix = far * 3 // 4
        self.prompts: list[list[int]] = [row[: min(PROMPT, length // 2)] for row in self.windows[:PROMPTS].tolist()]


def held_out_text() -> str:
    """About 100 kB that the reference model has not seen. Differs a little between versions of Python."""
    return "\n".join(_read(HELD_OUT))


def training_texts(limit: int = 1 << 20) -> list[str]:
    """About `limit` bytes (at most 1.5 MB) of what the reference model was trained on, a text a file."""
    texts: list[str] = []
    for text in _read(TRAINING):
        room = limit - sum(map(len, texts))
        if room <= 0:
            break
        texts.append(text[:room])
    return texts


def _read(names: tuple[str, ...]) -> list[str]:
    """The files that exist; a version of Python may have turned one into a package or dropped it."""
    home = Path(sysconfig.get_path("stdlib"))
    found = [(home / name).read_text(encoding="utf-8") for name in names if (home / name).is_file()]
    if not found:
        raise SmeltError(f"{home}: no sources of the standard library are installed; give a text with --text FILE")
    return found
