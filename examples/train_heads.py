"""Insert Medusa heads, train them on text with the base frozen, and see tokens per step rise."""

import argparse
import inspect

import smelt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150, help="training steps of the heads")
options = parser.parse_args()

text = [inspect.getsource(module) for module in (argparse, inspect)]  # any text will do: yours is better
lm = smelt.compile(
    smelt.reference_model(), "medusa-heads", train=text, overrides=[f"train.heads.steps={options.steps}"]
)
print(lm.report)

prompt = "def main():\n    parser = argparse.ArgumentParser("
fast = lm.complete([prompt], max_new_tokens=96)
plain = lm.complete([prompt], max_new_tokens=96, speculate=False)
assert fast.rows[0].tokens == plain.rows[0].tokens  # speculation changes the number of steps and nothing else
print(f"{fast.tokens_per_step:.2f} tokens a step, same text as token by token:\n{prompt}{fast.rows[0].text}")
