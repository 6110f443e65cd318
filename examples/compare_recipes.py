"""Several recipes on one model: bytes, bits per cached value, and how far the logits moved from the source."""

import smelt

RECIPES = ("none", "finequant", "quantized-pruning", "token-recycling")
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"

print(f"{'recipe':20} {'weights':>9} {'bits/value':>10} {'kl':>8} {'tokens/step':>12}")
for recipe in RECIPES:
    lm = smelt.compile(smelt.reference_model(), recipe)
    moved = lm.report.steps[-1].from_source
    bits = float(lm.program.cache.bits_per_value(1024))
    run = lm.complete([PROMPT], max_new_tokens=64)
    kl = moved.kl if moved else 0.0
    print(f"{recipe:20} {lm.program.nbytes / 1e6:6.2f} MB {bits:10.2f} {kl:8.4f} {run.tokens_per_step:12.2f}")
