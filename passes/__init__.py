"""Passes: one file each, found by its path. The file is the registration; there is no other list."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from .base import Exactness, Outcome, Pass, Samples


@cache
def catalogue() -> dict[str, type[Pass]]:
    """Every pass by name: `passes/<family>/<verb>.py` holds the pass `<family>.<verb>`, one class a file."""
    found: dict[str, type[Pass]] = {}
    for family in pkgutil.iter_modules(__path__):
        if not family.ispkg:
            continue
        package = importlib.import_module(f"{__name__}.{family.name}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.startswith("_"):
                continue
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            classes = [
                c
                for c in vars(loaded).values()
                if isinstance(c, type) and issubclass(c, Pass) and c.__module__ == loaded.__name__
            ]
            if len(classes) != 1:
                raise TypeError(f"{loaded.__name__} must define one pass, it defines {[c.__name__ for c in classes]}")
            found[f"{family.name}.{module.name}"] = classes[0]
    return found


__all__ = ["Exactness", "Outcome", "Pass", "Samples", "catalogue"]
