"""The recipe language: a recipe is a YAML file that names passes with their options, and states what it promises."""

from .editor import json_schema
from .loader import load, shipped
from .schema import FAMILIES, Bound, Gate, Header, Needs, Paper, Recipe, Step

__all__ = [
    "FAMILIES",
    "Bound",
    "Gate",
    "Header",
    "Needs",
    "Paper",
    "Recipe",
    "Step",
    "json_schema",
    "load",
    "shipped",
]
