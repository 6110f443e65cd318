"""`python -m smelt.recipes`: writes the JSON schema of recipes to recipe.schema.json, to be run when a pass changes."""

from pathlib import Path

from ..passes import catalogue
from .editor import FILE, json_schema, to_text

if __name__ == "__main__":
    Path(__file__).with_name(FILE).write_text(to_text(json_schema(catalogue())), encoding="utf-8")
