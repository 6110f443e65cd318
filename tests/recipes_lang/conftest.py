"""A small catalogue of passes for the recipe language, and recipes written to a temporary folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from smelt.ir.encoding import Encoding
from smelt.ir.errors import SmeltError
from smelt.ir.program import Program
from smelt.passes import Outcome, Pass, Samples


class Idle(Pass):
    """Does nothing: only the options matter here."""

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        return Outcome(())


@dataclass(frozen=True)
class Quantize(Idle):
    """Stores weights in fewer bits.

    bits: codes are this wide.
    group: values that share a scale,
        along the inner axis.
    scheme (text): how scales are found.
    """

    bits: int
    group: int | None = 64
    scheme: Literal["rtn", "gptq"] = "rtn"
    damping: float = 0.01
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must lie between 1 and 8, but is {self.bits}")


@dataclass(frozen=True)
class Tail:
    """What a cache keeps as it is."""

    size: int
    roll: bool = False


@dataclass(frozen=True)
class Encode(Idle):
    """Re-encodes the cache."""

    tail: int = 64
    keys: dict[str, Any] = field(default_factory=lambda: {"affine": {"bits": 2}, "order": [1, 2]})
    values: Encoding | None = None
    last: Tail | None = None
    heads: dict[str, int] | None = None
    tails: tuple[Tail, ...] = ()


@dataclass(frozen=True)
class Insert(Idle):
    """Inserts the cache."""


@dataclass(frozen=True)
class Heads(Idle):
    """Grows draft heads."""

    calibration = "text"
    count: int = 4

    def __post_init__(self) -> None:
        if self.count > 9:
            raise SmeltError("at most 9 heads")


@pytest.fixture(scope="session")
def catalogue() -> Mapping[str, type[Pass]]:
    """Four passes with the kinds of options that passes have."""
    return {"weights.quantize": Quantize, "cache.encode": Encode, "cache.insert": Insert, "decode.heads": Heads}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a recipe file into the working directory and gives its relative path."""
    monkeypatch.chdir(tmp_path)

    def to_file(text: str, name: str = "r.yaml") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return f"./{name}"

    return to_file
