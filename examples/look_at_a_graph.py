"""The same layer before and after a recipe: a Program prints as text, one node a line, and parses back equal."""

import smelt
from smelt.ir.text import parse_program, print_program

before = smelt.compile(smelt.reference_model(), "none").program
after = smelt.compile(smelt.reference_model(), "quantized-pruning").program


def show(title, program, like):
    print(f"--- {title}")
    for line in print_program(program).splitlines():
        if any(word in line for word in like):
            print(line[:150])


show("before", before, ("layers.0.mlp", "layer=0"))
show("after", after, ("layers.0.mlp", "layer=0"))
print("--- the cache of layer 0 before:", before.cache[0])
print("--- and after:", after.cache[0])
text = print_program(after)
assert print_program(parse_program(text, after.weights)) == text
print(f"{len(text.splitlines())} lines, parsed back equal")
