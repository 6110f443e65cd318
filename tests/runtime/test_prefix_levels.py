"""The level controller: the best quality that is in time, text where reading is quicker, and never a worse total."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.errors import SmeltError
from smelt.runtime.prefix_levels import TEXT, Offer, choose, decide

CHUNK = Offer((900, 600, 300), 10, 2.0)


@pytest.mark.parametrize(
    ("seconds", "way"), [(10.0, TEXT), (4.1, TEXT), (3.9, 0), (1.8, 0), (1.7, 1), (1.1, 2), (0.1, 2)]
)
def test_the_best_that_is_in_time(seconds: float, way: int) -> None:
    assert decide([CHUNK, CHUNK], 1000.0, seconds) == way


def test_text_comes_where_sending_is_slower_than_reading() -> None:
    assert choose([CHUNK] * 3, 10.0, 0.0) == [TEXT] * 3
    assert choose([CHUNK] * 3, 1e6, 0.0) == [2] * 3


def test_a_drop_of_the_bandwidth_makes_later_chunks_coarser() -> None:
    assert choose([CHUNK] * 4, [2000.0, 2000.0, 500.0, 500.0], 1.9) == [0, 0, 2, 2]


def test_time_that_is_left_goes_into_quality() -> None:
    chunks = [Offer((900, 600, 300), 10, 9.0)] * 4
    assert choose(chunks, 1000.0, 2.5) == [1, 1, 1, 1]
    assert choose(chunks, 1000.0, 2.8) == [1, 1, 1, 0]


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=6),
    st.floats(1.0, 1e4),
    st.floats(0.0, 10.0),
)
def test_whatever_some_one_way_can_meet_is_met(
    sizes: list[tuple[int, int, int]], bandwidth: float, seconds: float
) -> None:
    offers = [Offer(tuple(sorted(size, reverse=True)), 4, 0.5) for size in sizes]
    made = choose(offers, bandwidth, seconds)
    taken = sum(offer.takes(way, bandwidth) for offer, way in zip(offers, made, strict=True))
    totals = {way: sum(offer.takes(way, bandwidth) for offer in offers) for way in (TEXT, 0, 1, 2)}
    if min(totals.values()) <= seconds:
        assert taken <= seconds + 1e-6


def test_bad_input_is_named() -> None:
    with pytest.raises(SmeltError, match="above zero"):
        choose([CHUNK], 0.0, 1.0)
    with pytest.raises(SmeltError, match="2 chunks need as many bandwidths, not 1"):
        choose([CHUNK] * 2, [1.0], 1.0)
    with pytest.raises(SmeltError, match="at least one level"):
        Offer((), 1, 1.0)
