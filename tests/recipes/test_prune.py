"""Recipes that prune or train back, held to what those of weights are; in another file, for another process."""

from __future__ import annotations

import pytest

from .test_weights import check, named


@pytest.mark.parametrize("name", named("prune", "train"))
def test_a_recipe(name: str) -> None:
    """One test a recipe."""
    check(name)
