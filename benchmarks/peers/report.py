"""What the side-by-side benchmark shows of its samples: medians with quartiles, and ratios paired by round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Samples = Mapping[str, Sequence[float]]  # metric: one value a round
RATES = ("decode_128", "decode_2048", "prefill_512", "first_token_s")
SHOWN = {  # header: metric, how it is shown
    "decode at 128": ("decode_128", "{:.1f}"),
    "decode at 2048": ("decode_2048", "{:.1f}"),
    "prefill at 512": ("prefill_512", "{:.0f}"),
    "first token, s": ("first_token_s", "{:.2f}"),
    "cores": ("cores", "{:.1f}"),
}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratio(metric: str, ours: Samples, theirs: Samples) -> tuple[float, float, float] | None:
    """How many times as good ours is, round by round; of seconds fewer are better. None where one of them has none."""
    pairs = list(zip(ours.get(metric, ()), theirs.get(metric, ()), strict=False))
    if not pairs:
        return None
    return spread([b / a if metric.endswith("_s") else a / b for a, b in pairs])


def share_of_bound(row: Mapping[str, Any], bandwidth: Sequence[float]) -> tuple[float, float, float] | None:
    """Decoding at 128 over what reading the encoded weights alone allows, round by round."""
    rates = row.get("samples", {}).get("decode_128")
    if not rates or "read_bytes" not in row.get("convert", {}):
        return None
    size = row["convert"]["read_bytes"]
    return spread([rate * size / speed for rate, speed in zip(rates, bandwidth, strict=False)])


def same_first(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> float | None:
    """Share of requests whose first token is the reference's: by chance one in the vocabulary's size."""
    if reference is None or "error" in reference:
        return None
    pairs = list(zip(row["first_tokens"], reference["first_tokens"], strict=False))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def table(rows: Mapping[str, Mapping[str, Any]], bandwidth: Sequence[float]) -> str:
    """A row an engine, in Markdown: tokens a second, seconds, megabytes; for one that failed its last words."""
    headers = ["engine", *SHOWN, "peak MB", "encoded MB", "of bound", "convert s", "warm-up s", "same first token"]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)]]
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        cells = [_cell(form, row["samples"].get(metric)) for metric, form in SHOWN.values()]
        share = share_of_bound(row, bandwidth)
        convert = row["convert"]
        seconds = f"{convert['seconds']:.1f}"
        if "warm_seconds" in convert:
            seconds += f", again {convert['warm_seconds']:.1f}"
        same = same_first(row, rows.get("transformers"))
        lines.append(
            [
                *(name, *cells, f"{row['peak_bytes'] / 1e6:.0f}"),
                *(f"{convert['bytes'] / 1e6:.0f}", "" if share is None else f"{share[1]:.0%}"),
                *(seconds, f"{row['warm_up_s']:.1f}", "" if same is None else f"{same:.0%}"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratios(rows: Mapping[str, Mapping[str, Any]], ours: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each of ours to every other engine that gave numbers: metric to (low, median, high)."""
    good = {name: row["samples"] for name, row in rows.items() if "error" not in row}
    return {
        mine: {
            other: {m: found for m in RATES if (found := ratio(m, good[mine], good[other])) is not None}
            for other in good
            if other not in ours
        }
        for mine in ours
        if mine in good
    }


def ratio_table(found: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]]) -> str:
    """The ratios in Markdown: a row a pair."""
    names = {metric: header for header, (metric, _) in SHOWN.items()}
    lines = [["times as good", *(names[metric] for metric in RATES)], ["---", *["---:"] * len(RATES)]]
    for mine, others in found.items():
        for other, metrics in others.items():
            cells = [_triple("{:.2f}", metrics[metric]) if metric in metrics else "" for metric in RATES]
            lines.append([f"{mine} to {other}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(form: str, values: Sequence[float] | None) -> str:
    return _triple(form, spread(values)) if values else ""


def _triple(form: str, values: tuple[float, float, float]) -> str:
    low, median, high = (form.format(value) for value in values)
    return f"{median} ({low} to {high})"
