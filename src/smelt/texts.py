"""Texts that every Python has on disk: to calibrate on, and to measure on with the reference model."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from .ir.errors import SmeltError

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
