"""The report: aligned text that says what each step did, reasons counted, numbers as JSON."""

import json
import math

from smelt.passes.measure import NONE, Divergence
from smelt.passes.report import Report, StepReport, reasons, size

QUANTIZE = StepReport(
    2,
    "weights.quantize",
    "weights.quantize",
    "done",
    done=("a", "b"),
    skipped={"c": "too narrow", "d": "too narrow", "e": "not Dense"},
    weight_bytes=(11_546_984, 3_100_000),
    divergence=Divergence(0.0125, 0.97, 0.034),
    from_source=Divergence(0.02, 0.95, 0.05),
    seconds=1.26,
    notes={"group": 32},
)
ROLLED = StepReport(
    3, "prune", "prune.rows", "rolled back", ("a",), weight_bytes=(500, 400), divergence=NONE, why="kl 0.031 > 0.02"
)
REPORT = Report("llama", (QUANTIZE, ROLLED))

TEXT = """\
step  pass              status       sites   weights           kl      top-1  error  kl of source  time
2     weights.quantize  done         2 of 5  11.5 MB → 3.1 MB  0.0125  0.97   0.034  0.02          1.3 s
   left alone: 2 × too narrow (c, d)
   left alone: 1 × not Dense (e)
   group: 32
3     prune             rolled back  1       500 B → 400 B     0       1      0                    0.0 s
   rolled back: kl 0.031 > 0.02"""


def test_reads_in_a_terminal():
    assert str(REPORT) == TEXT


def test_table_has_a_row_a_step_and_no_empty_column():
    table = REPORT.table()
    assert "cache bits" not in table[0] and {len(row) for row in table} == {10}
    assert Report("llama").table()[1:] == []


def test_is_json():
    broken = StepReport(1, "a", "a", "done", divergence=Divergence(math.nan, math.nan, math.inf))
    data = json.loads(json.dumps(Report("llama", (QUANTIZE, broken)).to_dict(), allow_nan=False))
    assert data["program"] == "llama"
    assert data["steps"][0]["divergence"] == {"kl": 0.0125, "top1": 0.97, "max_error": 0.034}
    assert data["steps"][0]["skipped"] == dict(QUANTIZE.skipped)
    assert data["steps"][1]["divergence"] == {"kl": None, "top1": None, "max_error": None}


def test_reasons_are_grouped_the_most_frequent_first():
    skipped = {f"n{i}": "narrow" for i in range(4)} | {"w": "wide"} | {f"x{i}": f"odd {i}" for i in range(6)}
    assert reasons(skipped)[:2] == ["4 × narrow (n0, n1, n2, …)", "1 × wide (w)"]
    assert reasons(skipped)[-1] == "3 × 3 other reasons" and len(reasons(skipped)) == 6
    assert reasons({}) == []


def test_sizes_in_words():
    assert [size(n) for n in (0, 999, 1500, 123_456_789, 8e9)] == ["0 B", "999 B", "1.5 kB", "123 MB", "8 GB"]
