"""The Triton norm and rotary kernels: right in the interpreter at ragged shapes, compiled for sm_80 and sm_90."""

from pathlib import Path

import pytest
import torch

from smelt.codegen import rows_triton
from smelt.codegen.autotune_triton import Tile
from smelt.ir.errors import SmeltError
from smelt.ir.ops.norm import rms_norm
from smelt.ir.ops.rotary import rotary

from . import triton_checks as checks
from .triton_checks import compiled, interpreted

pytest.importorskip("triton", reason="triton is not installed")

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of a value, or of 1 for smaller ones
# query heads, key heads, channels of keys and of values, frequencies
SITES = {
    "plain": (4, 2, 64, 64, 32),
    "part": (3, 1, 48, 16, 10),
    "ragged": (2, 2, 63, 129, 31),
    "none": (2, 1, 16, 16, 0),
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference, relative where values are above 1; NaN counts as 9."""
    error = (a.double() - b.double()).abs() / b.double().abs().clamp_min(1)
    return float(error.nan_to_num(nan=9.0).max())


def norm_error(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """With and without a residual and a weight; rows lie apart, the total replaces the residual."""
    random = torch.Generator().manual_seed(m)
    x, stream = (torch.randn(m, k + 3, generator=random).to(device, dtype)[:, :k] for _ in range(2))
    gain = torch.randn(k, generator=random).to(device, dtype)
    out = torch.full((m, k + 1), float("nan"), dtype=dtype, device=device)[:, :k]
    rows_triton.rms_norm(x, out, gain, 1e-5, offset=1.0)
    worst = difference(out, rms_norm(x.double(), gain.double(), 1e-5, 1.0))
    total = x + stream
    out.fill_(float("nan"))
    rows_triton.rms_norm(x, out, None, 1e-5, residual=stream, total=stream)
    worst = max(worst, difference(out, rms_norm(total.double(), torch.ones_like(gain).double(), 1e-5)))
    return max(worst, difference(stream, total))


def rotary_error(
    site: tuple[int, int, int, int, int], new: int, dtype: torch.dtype, device: str = "cpu", dense: str = "float32"
) -> float:
    """q, k and v are views of one projection; the tails of two rows are filled to different lengths."""
    heads, groups, dim, value_dim, rotated = site
    widths, rows, width = (heads * dim, groups * dim, groups * value_dim), 2, 7 + new
    joined = torch.randn(rows, new, sum(widths), generator=torch.Generator().manual_seed(new)).to(device, dtype)
    q, k, v = (
        part.unflatten(2, (count, -1)).transpose(1, 2)
        for part, count in zip(joined.split(widths, 2), (heads, groups, groups), strict=True)
    )
    counts = torch.tensor([[0, 0, 0, 0], [4, 32, 7, 43]], dtype=torch.int32, device=device)
    positions = torch.tensor([[0], [60000]], device=device) + torch.arange(new, device=device)
    freq = torch.tensor(10000.0, device=device) ** (-torch.arange(rotated, device=device) / max(1, rotated))
    out = torch.full((rows, new, heads, dim), float("nan"), dtype=dtype, device=device).transpose(1, 2)
    tails = [
        torch.full((rows, groups, width, d), float("nan"), dtype=getattr(torch, dense), device=device)
        for d in (dim, value_dim)
    ]
    rows_triton.rotate_append(q, k, v, out, *tails, positions, counts, freq if rotated else None, 1.25)
    angle = positions[:, None, :, None].float() * freq
    cos, sin = angle.double().cos() * 1.25, angle.double().sin() * 1.25

    def right(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        a, b, rest = x[..., :rotated], x[..., rotated : 2 * rotated], x[..., 2 * rotated :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    assert difference(right(q), rotary(q.double(), positions, freq, 1.25)) < 1e-2 or not rotated
    worst = difference(out, right(q))
    for row, first in enumerate((0, 7)):
        last = first + new
        worst = max(worst, difference(tails[0][row, :, first:last], right(k)[row]))
        worst = max(worst, difference(tails[1][row, :, first:last], v[row]))
        for tail in tails:  # nothing else may be touched
            untouched = tail[row, :, :first].isnan().all() & tail[row, :, last:].isnan().all()
            worst = worst if untouched else 9.0
    return worst


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 63), (63, 129)])
def test_the_norm_equals_the_reference(m: int, k: int, dtype: torch.dtype) -> None:
    assert norm_error(m, k, dtype) < TOLERANCE[dtype]


@interpreted
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_rotary_and_append_equal_the_reference(site: tuple[int, int, int, int, int], new: int) -> None:
    assert rotary_error(site, new, torch.float32) < TOLERANCE[torch.float32]
    assert rotary_error(site, new, torch.float16, dense="float16") < TOLERANCE[torch.float16]


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("v = rounded.to(tl.float32)", "v = v - rounded.to(tl.float32)"),
        (" / K + eps", " / K * 1.1 + eps"),
        ("v *= 1.0 + offset", "v *= 1.05 + offset"),
        ("mask=k < K, other=0).to(tl.float32) + offset", "mask=k < K - 1, other=0).to(tl.float32) + offset"),
    ],
)
def test_a_wrong_norm_is_caught(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    mutate(monkeypatch, right, wrong)
    assert norm_error(3, 63, torch.float32) > 100 * TOLERANCE[torch.float32]


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.where(e < R, -other, other)", "other"),
        ("(sine * scale)", "sine"),
        ("* W + tl.load(counts + 4 * b + 2) + t", "* W + tl.load(counts + 4 * b + 2)"),
        ("g * v_h", "0 * v_h"),
        ("(quarter == 1) | (quarter == 2)", "quarter == 1"),
        ("angle * 0.63661977236758134", "angle * 0.6366"),
    ],
)
def test_a_wrong_rotary_is_caught(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    mutate(monkeypatch, right, wrong)
    assert rotary_error(SITES["plain"], 3, torch.float32) > 100 * TOLERANCE[torch.float32]


def mutate(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in rows_triton.SOURCE
    mutant = rows_triton.load(rows_triton.SOURCE.replace(right, wrong), "rows")
    monkeypatch.setattr(rows_triton, "kernels", lambda: mutant)


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    checks.in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("columns", [129, 4096, 16384])
def test_the_norm_compiles_without_a_spill(
    columns: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    constants = rows_triton.norm_constants(columns)
    tile = Tile(warps=constants.pop("num_warps"))
    types = rows_triton.norm_signature("bfloat16", residual=True)
    used = checks.usage(rows_triton.kernels().rms_norm, types, constants, tile, capability, tmp_path)
    assert used.spilled == 0 and used.registers <= 128 and used.shared <= 1024


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_rotary_compiles_without_local_memory(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    constants = rows_triton.rotary_constants(32, 8, 128, 128, 64)
    tile = Tile(warps=constants.pop("num_warps"))
    types = rows_triton.rotary_signature("bfloat16", "bfloat16")
    used = checks.usage(rows_triton.kernels().rotate_append, types, constants, tile, capability, tmp_path)
    assert used.spilled == 0 and used.registers <= 48 and used.shared <= 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_equal_the_reference_on_a_gpu(dtype: torch.dtype) -> None:
    for m, k in ((1, 1), (3, 63), (129, 4096), (2, 16384)):
        assert norm_error(m, k, dtype, "cuda") < TOLERANCE[dtype]
    for site in SITES.values():
        for new in (1, 63):
            assert rotary_error(site, new, dtype, "cuda", str(dtype).removeprefix("torch.")) < TOLERANCE[dtype]


def test_operands_that_do_not_fit_are_refused() -> None:
    x, y = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(SmeltError, match="must have one shape"):
        rows_triton.rms_norm(x, torch.zeros(2, 9))
    with pytest.raises(SmeltError, match="come together"):
        rows_triton.rms_norm(x, y, residual=x)
    q, tail, place = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, dtype=torch.int64)
    counts = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(SmeltError, match="rotate 10 channels, but a head has 8"):
        rows_triton.rotate_append(q, q, q, q, tail, tail, place, counts, torch.zeros(5))
    with pytest.raises(SmeltError, match="the tail must be contiguous"):
        rows_triton.rotate_append(q, q, q, q, tail[:, :, 1:], tail, place, counts)
