"""Four compressions and a drafter in one recipe: compile the bundled model by `all-four`, and let it write."""

import time

import smelt
from smelt.texts import training_texts

PROMPT = "def fib(n):\n    "

start = time.perf_counter()
lm = smelt.compile(smelt.reference_model(), "all-four", calibration=training_texts(80_000))
print(lm.report)
print(f"compiled in {time.perf_counter() - start:.0f} s\n")

print(PROMPT, end="", flush=True)
for piece in lm.stream(PROMPT, max_new_tokens=64, temperature=0.7, seed=3):
    print(piece, end="", flush=True)
print("\n")

fast = lm.complete([PROMPT], max_new_tokens=64)
plain = lm.complete([PROMPT], max_new_tokens=64, speculate=False)
assert fast.rows[0].tokens == plain.rows[0].tokens  # drafts change the number of steps and nothing else
print(f"{fast.tokens_per_step:.2f} tokens a step, and the same text as token by token")
