"""Wrong kernels for tests: a text replaced in the generated translation unit, which must be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from smelt.codegen import unit
from smelt.codegen.unit import Function


@contextmanager
def mutant(right: str, wrong: str) -> Iterator[None]:
    """Units that are made inside have `wrong` in place of `right`; fails where none of them had it."""
    assembled, found = unit.source, []

    def source(functions: Sequence[Function]) -> str:
        text = assembled(functions)
        found.append(text.count(right))
        return text.replace(right, wrong)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "source", source)
        yield
    assert any(found), f"no unit holds the text to replace: {right}"
