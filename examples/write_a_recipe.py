"""A recipe is YAML: a chain of passes with options. This one keeps a short window in front of a 4-bit cache."""

import tempfile
from pathlib import Path

import smelt

RECIPE = """
name: short-window
family: cache
does: Keeps the first 4 and the last 64 tokens as they are, and one in four of the rest in 4 bits.
paper: {title: "A composition of my own", year: 2026, url: "https://example.org"}
needs: {training: false, calibration: none}
steps:
  - cache.insert: {dtype: float16}
  - cache.select: {score: recency, keep: 0.5, sink: 4, tail: 64, page: 64}
  - cache.encode:
      keys:   {affine: {bits: 4, axis: channel, group: 32, zero: true}}
      values: {affine: {bits: 4, axis: token, group: 32, zero: true}}
      gate: {max_kl: 1.0, otherwise: stop}
"""

path = Path(tempfile.mkdtemp()) / "short-window.yaml"
path.write_text(RECIPE)
overrides = ["cache.select.keep=0.25", "cache.encode.keys.affine.group=16"]
lm = smelt.compile(smelt.reference_model(), path, overrides=overrides)
print(lm.report)
print(lm.generate("import os\n", max_new_tokens=32))
