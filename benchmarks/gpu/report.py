"""What the GPU benchmark shows of its facts: a table for each contest, bars, and a speed only where a check passed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .contest import Bar

Facts = Mapping[str, Mapping[str, Any]]  # what `hold` found, by entry


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def table(name: str, facts: Facts) -> str:
    """A line an entry: its error, and what it took; for one that failed only why."""
    width = max(map(len, facts))
    lines = [name]
    for entry, found in facts.items():
        lines.append(f"  {entry:<{width}}  {_line(found, facts)}")
        for piece, seconds in found.get("pieces", {}).items() if "failed" not in found else ():
            lines.append(f"  {'':<{width}}    {piece} alone {spread(seconds)[1] * 1e6:.1f} µs")
    return "\n".join(lines)


def _line(found: Mapping[str, Any], facts: Facts) -> str:
    if "missing" in found:
        return str(found["missing"])
    if "failed" in found:
        return f"FAILED: {found['failed']}"
    words = [f"error {found['error']:.1e}"]
    if "seconds" in found:
        low, median, high = spread(found["seconds"])
        words.append(f"{median * 1e6:.1f} µs ({low * 1e6:.1f} to {high * 1e6:.1f})")
        words.append(f"{found['nbytes'] / median / 1e9:.0f} GB/s")
        if found["flops"] / median > 1e12:
            words.append(f"{found['flops'] / median / 1e12:.1f} TFLOP/s")
        words.append(f"{found['bound'] / median:.0%} of the bound")
        first = next(other for other in facts.values() if "seconds" in other and "failed" not in other)
        if found is not first:
            words.append(f"takes × {ratio(found['seconds'], first['seconds'])[1]:.2f}")
    if "untimed" in found:
        words.append(f"not timed: {found['untimed']}")
    if "peak" in found:
        words.append(f"{found['peak'] / 1e6:.0f} MB")
    return ", ".join(words)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of how many times as long the first takes, round by round."""
    return spread([a / b for a, b in zip(slower, faster, strict=False)])


def reached(bar: Bar, facts: Facts) -> dict[str, Any]:
    """What a bar asks for, and what was reached; None where that is unknown."""
    timed = {name: found for name, found in facts.items() if "seconds" in found and "failed" not in found}
    rivals = {name: timed[name] for name in bar.rivals if name in timed}
    value, against = None, "the bound"
    if bar.entry in timed and bar.rivals and rivals:
        against = min(rivals, key=lambda name: statistics.median(rivals[name]["seconds"]))
        value = ratio(rivals[against]["seconds"], timed[bar.entry]["seconds"])[1]
    elif bar.entry in timed and not bar.rivals:
        value = timed[bar.entry]["bound"] / statistics.median(timed[bar.entry]["seconds"])
    elif bar.rivals:
        against = " or ".join(bar.rivals)
    met = None if value is None else value >= bar.least
    return {"entry": bar.entry, "against": against, "asked": bar.least, "reached": value, "met": met}


def bar_line(name: str, found: Mapping[str, Any]) -> str:
    """One bar in words."""
    asked = f"{name}: {found['entry']} against {found['against']}, asked {found['asked']:.2f}"
    if found["reached"] is None:
        return f"{asked}, not measured"
    return f"{asked}, reached {found['reached']:.2f}: {'met' if found['met'] else 'MISSED'}"
