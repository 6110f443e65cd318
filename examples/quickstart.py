"""Compile the bundled model to 4 bits, generate text, save it, and read it back."""

import tempfile
from pathlib import Path

import smelt

lm = smelt.compile(smelt.reference_model(), "finequant")
print(lm.report)

prompt = "def read_lines(path):\n"
print(prompt + lm.generate(prompt, max_new_tokens=48))

folder = Path(tempfile.mkdtemp()) / "python.smelt"
lm.save(folder)
again = smelt.load(folder)
assert again.generate(prompt, max_new_tokens=48) == lm.generate(prompt, max_new_tokens=48)
print("saved to", folder, f"({sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB)")
