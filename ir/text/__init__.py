"""The text form of a Program: `parse_program(print_program(p), p.weights)` is `p` again."""

from .parser import parse_program
from .printer import print_program
from .same import same_program

__all__ = ["parse_program", "print_program", "same_program"]
