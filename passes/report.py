"""What each step of a recipe did, as data and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .measure import Divergence

Status = Literal["done", "nothing to do", "rolled back", "failed"]
HEADER = ("step", "pass", "status", "sites", "weights", "cache bits", "kl", "top-1", "error", "kl of source", "time")
SHOWN_SITES = 3
SHOWN_REASONS = 5


@dataclass(frozen=True)
class StepReport:
    """One step: the sites it rewrote, those it left alone and why, and what came of it.

    weight_bytes: stored bytes of all weights before and after.
    cache_bits: stored bits per cached value at a context of 1024 tokens, before and after; None without a cache.
    divergence: of the outputs from before the step; from_source: of the outputs from the first Program. None where
    nothing was measured, or could be.
    why: why the step was rolled back or failed.
    seconds: the pass alone; measuring: verifying and replaying it.
    """

    number: int
    name: str
    pass_name: str
    status: Status
    done: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    weight_bytes: tuple[int, int] = (0, 0)
    cache_bits: tuple[float | None, float | None] = (None, None)
    divergence: Divergence | None = None
    from_source: Divergence | None = None
    seconds: float = 0.0
    measuring: float = 0.0
    why: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        plain: dict[str, Any] = dict(vars(self))
        for name in ("divergence", "from_source"):
            plain[name] = plain[name] and plain[name].to_dict()
        for name in ("done", "weight_bytes", "cache_bits"):
            plain[name] = list(plain[name])
        return {**plain, "skipped": dict(self.skipped), "notes": dict(self.notes)}

    def row(self) -> list[str]:
        """The cells under HEADER."""
        d, s = self.divergence, self.from_source
        left = len(self.skipped)
        return [
            str(self.number),
            self.name,
            self.status,
            f"{len(self.done)}" + (f" of {len(self.done) + left}" if left else ""),
            _change(*map(size, self.weight_bytes)),
            _change(*map(_number, self.cache_bits)),
            *(["", "", ""] if d is None else map(_number, (d.kl, d.top1, d.max_error))),
            "" if s is None else _number(s.kl),
            f"{self.seconds + self.measuring:.1f} s",
        ]

    def remarks(self) -> list[str]:
        """What stands below the row: why the step did not stand, why sites were left alone, what the pass notes."""
        lines = [f"{self.status}: {self.why}"] if self.why else []
        lines += [f"left alone: {line}" for line in reasons(self.skipped)]
        return lines + [f"{name}: {value}" for name, value in self.notes.items()]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepReport:
        """Inverse of `to_dict`; what was not a number and became null is NaN again."""
        told = dict(data)
        for name in ("divergence", "from_source"):
            measured = told.get(name)
            told[name] = measured and Divergence(**{k: math.nan if v is None else v for k, v in measured.items()})
        for name in ("done", "weight_bytes", "cache_bits"):
            told[name] = tuple(told[name])
        return cls(**told)


@dataclass(frozen=True)
class Report:
    """What became of each step, in the order in which they ran."""

    program: str
    steps: tuple[StepReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"program": self.program, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        return cls(data["program"], tuple(map(StepReport.from_dict, data["steps"])))

    def table(self) -> list[list[str]]:
        """A row a step, the header first; columns in which no step has anything to say are left out."""
        rows = [list(HEADER), *(step.row() for step in self.steps)]
        told = [i for i in range(len(HEADER)) if not self.steps or any(row[i] for row in rows[1:])]
        return [[row[i] for i in told] for row in rows]

    def __str__(self) -> str:
        """The table in aligned text, each row followed by its remarks."""
        rows = self.table()
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        out = lines[:1]
        for line, step in zip(lines[1:], self.steps, strict=True):
            out += [line, *(f"   {remark}" for remark in step.remarks())]
        return "\n".join(out)


def reasons(skipped: Mapping[str, str]) -> list[str]:
    """Reasons with the number of sites and some of their names, the most frequent first."""
    sites: dict[str, list[str]] = {}
    for site, reason in skipped.items():
        sites.setdefault(reason, []).append(site)
    groups = sorted(sites.items(), key=lambda group: -len(group[1]))
    lines = [f"{len(names)} × {reason} ({_some(names)})" for reason, names in groups[:SHOWN_REASONS]]
    if rest := groups[SHOWN_REASONS:]:
        lines.append(f"{sum(len(names) for _, names in rest)} × {len(rest)} other reasons")
    return lines


def size(count: int) -> str:
    """Bytes in words: `11.6 MB`."""
    for unit, each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= each:
            return f"{count / each:.3g} {unit}" if count < 100 * each else f"{count / each:.0f} {unit}"
    return f"{count} B"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN_SITES]) + (", …" if len(listed) > SHOWN_SITES else "")


def _change(before: str, after: str) -> str:
    return after if before == after else f"{before or 'none'} → {after or 'none'}"


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
