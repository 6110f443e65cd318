"""A coded cache is off by at most half a step, in about the bits that it is worth, and bad options are named."""

import dataclasses

import numpy as np
import pytest
import torch

from smelt.ir.cache.code import LEVELS, Code, Level, Scales, pack, profile, restored, rounded, steps, unpack
from smelt.ir.errors import SmeltError

pytest.importorskip("constriction")
DELTAS = ("none", "anchor", "fitted")


def stream(tokens: int, channels: int, hold: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Channels of unlike mean and spread whose tokens follow each other by `hold`, with rare outliers."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, channels)
    for t in range(1, tokens):
        x[t] = hold * x[t - 1] + (1 - hold**2) ** 0.5 * x[t]
    x[::97, 0] += 40
    return x * torch.logspace(-2, 2, channels) + torch.linspace(-50, 50, channels)


def coded(x: torch.Tensor, code: Code, step: float) -> tuple[torch.Tensor, int, Scales]:
    scales, every = Scales.measure(x, code), torch.full((x.shape[1],), step)
    chunks = [x[i : i + code.chunk] for i in range(0, len(x), code.chunk)]
    rows = [rounded(chunk, scales, every, code) for chunk in chunks]
    bank = profile(rows, code.tables)
    data = [pack(r, bank) for r in rows]
    sizes = [code.rows(len(chunk), x.shape[1]) for chunk in chunks]
    back = [restored(unpack(d, bank, s), scales, every, code) for d, s in zip(data, sizes, strict=True)]
    return torch.cat(back), sum(map(len, data)), scales


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("tokens", [1, 9, 10, 129, 300])
def test_no_value_is_off_by_more_than_half_a_step(delta: str, tokens: int) -> None:
    x = stream(tokens, 24, 0.5)
    back, _, scales = coded(x, Code(chunk=64, delta=delta), 0.5)
    off = (back - x).abs() / scales.spread.float()
    assert off.max() <= 0.25 + 1e-3
    if tokens >= 129:
        assert off.max() > 0.2  # a step that was too fine would pass the bound and waste bits


def test_deltas_pay_where_neighbours_are_alike_and_only_there() -> None:
    def bits(hold: float, delta: str) -> float:
        x = stream(2000, 24, hold)
        return 8 * coded(x, Code(delta=delta), 0.5)[1] / x.numel()

    alike = {delta: bits(0.98, delta) for delta in DELTAS}
    strange = {delta: bits(0.0, delta) for delta in DELTAS}
    assert alike["anchor"] < alike["none"] - 0.5 and alike["fitted"] < alike["none"] - 0.5
    assert strange["anchor"] > strange["none"] + 0.2
    assert strange["fitted"] < strange["none"] + 0.05


def test_outliers_beyond_the_alphabet_are_escaped_and_come_back() -> None:
    row = np.array([0, 1, -1] * 20000 + [70_000_000, -5000], np.int32)
    bank = profile([[row]], 4)
    assert bank.weights.shape[1] == 4  # -1, 0, 1 and the escape
    assert np.array_equal(unpack(pack([row], bank), bank, [row.size])[0], row)


@pytest.mark.parametrize("cut", [0, 3, 5, -1, -8])
def test_a_cut_chunk_is_refused(cut: int) -> None:
    row = np.array([0, 1, -1] * 100 + [5000] * 3, np.int32)
    bank = profile([[np.array([0, 1, -1] * 20000, np.int32)]], 4)
    with pytest.raises(SmeltError):
        unpack(pack([row], bank)[:cut], bank, [row.size])


def test_a_mean_a_spread_and_a_step_each_matter() -> None:
    """Mutants: each of what the file stores changes what is read."""
    x, code = stream(100, 8, 0.5), Code(chunk=64, delta="fitted")
    scales, every = Scales.measure(x, code), torch.full((8,), 0.5)
    rows = rounded(x, scales, every, code)
    right = restored(rows, scales, every, code)
    for name in ("mean", "spread", "gain"):
        wrong = dataclasses.replace(scales, **{name: getattr(scales, name) * 1.05})
        assert not torch.allclose(restored(rows, wrong, every, code), right, rtol=1e-4)
    assert not torch.allclose(restored(rows, scales, every * 1.05, code), right, rtol=1e-4)


def test_steps_follow_the_depth() -> None:
    level = Level("own", (0.5, 1.0, 1.5), (2.0,))
    assert [level.step("keys", i, 7) for i in range(7)] == [0.5, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5]
    assert steps(level, "keys", [2, 1, 3]).tolist() == [0.5, 0.5, 1.0, 1.5, 1.5, 1.5]
    assert steps(level, "values", [1, 1]).tolist() == [2.0, 2.0]


def test_coarser_levels_take_fewer_bits() -> None:
    x = stream(600, 16)
    sizes = [coded(x, Code(), level.step("keys", 0, 1))[1] for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_chunks_leave_the_sinks_out() -> None:
    assert Code(chunk=64, sink=4).chunks(140) == [slice(4, 68), slice(68, 132), slice(132, 140)]
    assert Code(sink=4).chunks(4) == Code(sink=4).chunks(2) == []


def test_a_channel_that_never_changes_costs_nothing_and_is_exact() -> None:
    x = torch.full((500, 4), 3.0)
    back, size, _ = coded(x, Code(), 1.0)
    assert torch.equal(back, x) and size < 40


def test_options_come_back_from_json() -> None:
    code = Code(levels=({"name": "a", "keys": 0.5, "values": [1, 2]},), delta="anchor")
    assert code.levels == (Level("a", (0.5,), (1.0, 2.0)),)
    assert Code(**dataclasses.asdict(code)) == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ()}, "levels need names"),
        ({"levels": (LEVELS[0], LEVELS[0])}, "levels need names"),
        ({"chunk": 0}, "cannot be"),
        ({"sink": -1}, "cannot be"),
        ({"delta": "mean"}, "known: none, anchor, fitted"),
        ({"group": 1}, "a group counts"),
        ({"chunk": 8}, "a group counts"),
        ({"tables": 0}, "tables counts"),
        ({"levels": ({"name": "lossless", "keys": 1, "values": 1},)}, "cannot be called"),
        ({"levels": ({"name": "a", "keys": 0, "values": 1},)}, "level a: keys"),
        ({"levels": ({"name": "a", "keys": 1, "values": ()},)}, "level a: values"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SmeltError, match=message):
        Code(**options)  # type: ignore[arg-type]


def test_values_that_no_step_can_round_are_refused() -> None:
    x = torch.ones(10, 2)
    x[3, 1] = torch.nan
    with pytest.raises(SmeltError, match="NaN"):
        Scales.measure(x, Code())
    with pytest.raises(SmeltError, match="lossless"):
        Scales.measure(torch.full((10, 2), 1e6), Code())
    scales = Scales.measure(torch.zeros(10, 2), Code())
    with pytest.raises(SmeltError, match="lossless"):
        rounded(torch.full((1, 2), 6e4), scales, torch.full((2,), 1e-3 / 2), Code())
