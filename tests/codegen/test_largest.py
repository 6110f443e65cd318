"""The largest of each row by a kernel: the ids that a stable sort finds."""

import numpy as np
import pytest
import torch

from smelt.codegen import largest as module
from smelt.codegen.largest import Largest


def sorted_ids(x: torch.Tensor, count: int) -> torch.Tensor:
    """The reference: of equal numbers the first stands first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def numbers(rows: int, columns: int, distinct: int = 1 << 24) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows + columns)
    return torch.randint(-distinct, distinct, (rows, columns), generator=random).float()


@pytest.mark.parametrize("columns", [8, 19, 63, 64, 65, 129, 1003, 32000])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("distinct", [1, 50, 1 << 24])
@pytest.mark.parametrize("count", [1, 8])
def test_equals_a_stable_sort(columns: int, rows: int, distinct: int, count: int) -> None:
    x = numbers(rows, columns, distinct)
    assert np.array_equal(Largest(count)(x), sorted_ids(x, count))


@pytest.mark.parametrize("descending", [False, True])
def test_takes_what_is_sorted_already(descending: bool) -> None:
    x = numbers(3, 4099).sort(-1, descending=descending).values
    assert np.array_equal(Largest(8)(x), sorted_ids(x, 8))


def test_one_serves_any_number_of_rows_wherever_they_lie() -> None:
    find, wide = Largest(4), numbers(9, 300)
    for x in (wide[:2], wide, wide[3:8, 20:170], wide[:0]):
        assert np.array_equal(find(x), sorted_ids(x, 4))


def test_forbidden_tokens_and_nan_come_last() -> None:
    x = torch.full((1, 200), -torch.inf)
    x[0, [150, 3]] = torch.tensor([1.0, 2.0])
    assert Largest(4)(x).tolist() == [[3, 150, 0, 1]]
    x[0, 77] = torch.nan
    assert Largest(3)(x).tolist() == [[3, 150, 0]]


def test_equals_the_blocks_of_the_reference_target() -> None:
    from smelt.runtime.drafters.largest import largest

    x = torch.stack([torch.randperm(32000, generator=torch.Generator().manual_seed(row)) for row in range(5)]).float()
    assert np.array_equal(Largest(8)(x), largest(x, 8))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("score > best[at - 1]", "score >= best[at - 1]"),
        ("id = blocks * BLOCK; id < columns", "id = columns; id < columns"),
        ("most[block] >= least", "most[block] > least"),
        ("held == count && !(", "!("),
    ],
)
def test_a_mutant_is_seen(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in module._SOURCE
    monkeypatch.setattr(module, "_SOURCE", module._SOURCE.replace(right, wrong))
    monkeypatch.setattr(module, "_kernel", module._kernel.__wrapped__)
    x = numbers(2, 2003, 50)
    x[:, -1] = 100.0
    assert not np.array_equal(Largest(8)(x), sorted_ids(x, 8))


def test_refuses_what_it_would_misread() -> None:
    for x in (torch.zeros(2, 20).T, torch.zeros(2, 20, dtype=torch.float64), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="largest takes float32"):
            Largest(4)(x)
