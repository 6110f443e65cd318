"""Symbols come back as they went in, take about their entropy, and damage is found."""

import numpy as np
import pytest

from smelt.ir.cache.entropy import CHECK, Bank, fit
from smelt.ir.errors import SmeltError

pytest.importorskip("constriction")


def laplace(scale: float, size: int, seed: int, most: int = 20) -> np.ndarray:
    """Integers around `most`, clipped to 0 … 2 · most."""
    drawn = np.random.default_rng(seed).laplace(0, scale, size)
    return np.clip(np.rint(drawn) + most, 0, 2 * most).astype(np.int32)


def counts(rows: list[np.ndarray], symbols: int) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=symbols) for row in rows])


@pytest.mark.parametrize("most", [1, 3, 256])
@pytest.mark.parametrize("sizes", [(1,), (0, 0), (63, 0, 129, 1), (40,) * 7])
def test_symbols_come_back(most: int, sizes: tuple[int, ...]) -> None:
    rows = [laplace(1.0 + i, size, i) for i, size in enumerate(sizes)]
    bank = fit(counts(rows, 41), most)
    back = bank.decode(bank.encode(rows), sizes)
    assert all(np.array_equal(a, b) for a, b in zip(rows, back, strict=True))


def test_symbols_that_no_count_was_made_of_come_back_too() -> None:
    bank = fit(counts([np.zeros(100, np.int32)], 9), 4)
    row = np.arange(9, dtype=np.int32)
    assert np.array_equal(bank.decode(bank.encode([row]), [9])[0], row)


def test_a_stream_takes_the_entropy_of_its_rows() -> None:
    rows = [laplace(scale, 4000, i) for i, scale in enumerate([0.3] * 10 + [4.0] * 10)]
    bank = fit(counts(rows, 41), 2)
    shares = counts(rows, 41) / 4000
    entropy = -(shares * np.log2(np.maximum(shares, 1e-12))).sum() * 4000
    bits = 8 * (len(bank.encode(rows)) - CHECK)
    assert entropy < bits < 1.01 * entropy
    one = fit(counts(rows, 41), 1)
    assert 8 * len(one.encode(rows)) > 1.2 * bits  # rows of two kinds under one table: the fit is what saves


def test_like_rows_share_a_table() -> None:
    rows = [laplace(0.3 if i % 3 else 5.0, 500, i) for i in range(30)]
    bank = fit(counts(rows, 41), 2)
    assert len({int(bank.of[i]) for i in range(0, 30, 3)}) == 1
    assert bank.of[0] != bank.of[1] and bank.nbytes == 2 * 41 * 2 + 30


@pytest.mark.parametrize("fault", ["cut", "word", "bit", "check", "other sizes", "other table"])
def test_damage_is_found(fault: str) -> None:
    rows = [laplace(2.0, 300, i) for i in range(4)]
    bank = fit(counts(rows, 41), 2)
    data, sizes = bytearray(bank.encode(rows)), [300] * 4
    if fault == "cut":
        data = data[:-3]
    elif fault == "word":
        data = data[:-4]
    elif fault == "bit":
        data[60] ^= 4
    elif fault == "check":
        data[0] ^= 1
    elif fault == "other sizes":
        sizes = [300, 300, 300, 299]
    else:
        bank = Bank(bank.weights[:, ::-1].copy(), bank.of)
    with pytest.raises(SmeltError, match="entropy coding"):
        bank.decode(bytes(data), sizes)


def test_symbols_beyond_the_tables_are_refused() -> None:
    bank = fit(np.ones((1, 4), np.int64), 1)
    for bad in (-1, 4):
        with pytest.raises(SmeltError, match="0 to 3"):
            bank.encode([np.array([bad], np.int32)])
    with pytest.raises(SmeltError, match="2 rows, but the tables were made for 1"):
        bank.encode([np.zeros(1, np.int32)] * 2)


def test_tables_without_weight_are_refused() -> None:
    with pytest.raises(SmeltError, match="no weight"):
        Bank(np.array([[1, 0]], np.uint16), np.zeros(1, np.uint8))
    with pytest.raises(SmeltError, match="not there"):
        Bank(np.ones((1, 2), np.uint16), np.ones(1, np.uint8))
