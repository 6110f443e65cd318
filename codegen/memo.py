"""Generated texts and verdicts, kept between processes: index arithmetic in symbols takes seconds, reading it does not.

An entry is named by what it was asked for and by the sources that answer, so that it never outlives either.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..ir.encoding import Encoding
from .build import cache


def remembered(question: str, encoding: Encoding, answer: Callable[[], str]) -> str:
    """The answer to a question about an encoding; found again on disk if the encoding is one of smelt's own."""
    if not type(encoding).__module__.startswith(__package__.rpartition(".")[0] + ".ir."):
        return answer()  # who writes an encoding changes it from run to run
    key = hashlib.sha256("\0".join([_sources(), question, str(encoding)]).encode()).hexdigest()[:32]
    path = cache() / "texts" / key
    if path.exists():
        return path.read_text(encoding="utf-8")
    text = answer()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
    return text


_ANSWERING = (
    "choose", "expand", "hoist", "interleave", "loops", "planes", "product", "product_template", "ranges",
    "walk", "printers/cpp", "printers/index",
)  # fmt: skip


@functools.cache
def _sources() -> str:
    """A hash of the code that answers: what generates products, and the encodings."""
    here = Path(__file__).parent
    answering = [here / f"{name}.py" for name in _ANSWERING]
    digest = hashlib.sha256()
    for path in (*answering, *sorted((here.parent / "ir" / "encoding").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
