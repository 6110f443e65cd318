"""Row lookup: equal to decoding the whole table, in every encoding, and never outside of it."""

import pytest
import torch

from smelt.codegen.gather import gather_kernel
from smelt.codegen.rows import RowKernel
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.errors import SmeltError
from smelt.ir.weight import Weight

from .mutants import mutant

TABLES: list[tuple[Encoding, int]] = [
    *((Dense(dtype), width) for dtype in ("float32", "float16", "bfloat16") for width in (1, 63)),
    (Affine(8, 0), 129),
    (Affine(8, 32, zero=True), 64),
    (Affine(4, 64), 192),
    (Affine(4, 9, "channel", True), 96),
    (Affine(2, 16, zero=True, scale="float32"), 128),
]
ROWS = 63
TOLERANCE = 1e-6  # code times scale plus zero, in one rounding or two


def table(encoding: Encoding, width: int, rows: int = ROWS) -> Weight:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    return Weight((rows, width), encoding, encoding.encode(w))


def kernel(weight: Weight) -> RowKernel:
    found = gather_kernel(weight)
    assert isinstance(found, RowKernel)
    return found


def look_up(found: RowKernel, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
    out = torch.full((*ids.shape, weight.shape[1]), float("nan"))
    found.bind({"ids": ids, "weight": weight}, out)()
    return out


@pytest.mark.parametrize(("encoding", "width"), TABLES, ids=str)
def test_equals_rows_of_the_decoded_table(encoding: Encoding, width: int) -> None:
    weight = table(encoding, width)
    for ids in (torch.tensor([[62]]), torch.arange(ROWS), torch.arange(129).view(3, 43) % ROWS):
        want = weight.dense()[ids]
        error = (look_up(kernel(weight), weight, ids) - want).abs().max()
        assert error <= (0 if isinstance(encoding, Dense) else TOLERANCE)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("& 15) - 8)", "& 15) - 7)"), ("(int64_t k = 0; k < 192", "(int64_t k = 1; k < 192"), ("[1])[r];", "[1])[0];")],
)
def test_the_comparison_catches_a_wrong_kernel(right: str, wrong: str) -> None:
    weight = table(Affine(4, 64), 192)
    ids, want = torch.arange(5), weight.dense()[:5]
    with mutant(right, wrong):
        error = (look_up(kernel(weight), weight, ids) - want).abs().max().nan_to_num(nan=1.0)
    assert error > 100 * TOLERANCE


def test_a_wrong_id_is_told_once() -> None:
    """The next step of the same call starts anew."""
    weight, ids = table(Dense("float16"), 8), torch.tensor([3, -1])
    out = torch.empty(2, 8)
    bound = kernel(weight).bind({"ids": ids, "weight": weight}, out)
    with pytest.raises(SmeltError, match="id -1"):
        bound()
    ids[1] = 4
    bound()
    assert torch.equal(out, weight.dense()[[3, 4]])


@pytest.mark.parametrize("wrong", [-1, ROWS, 1 << 40])
def test_an_id_outside_of_the_table_is_an_error(wrong: int) -> None:
    weight = table(Dense("float16"), 8)
    with pytest.raises(SmeltError, match=f"id {wrong} is not one of the table's {ROWS} rows"):
        look_up(kernel(weight), weight, torch.tensor([[3, wrong, 4]]))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight.of(torch.zeros(8)), "must be two-dimensional"),
        (Weight.of(torch.zeros(8, 2, dtype=torch.int64)), "values are int64"),
        (Weight.of(torch.zeros(8, 2, dtype=torch.float64)), "stores float64"),
    ],
)
def test_what_has_no_kernel_has_a_reason(weight: Weight, reason: str) -> None:
    found = gather_kernel(weight)
    assert isinstance(found, str) and reason in found


def test_parts_that_do_not_hold_the_table_are_refused() -> None:
    weight, ids = table(Affine(4, 64), 192), torch.zeros(1, dtype=torch.int64)
    fewer = Weight((ROWS + 1, 192), weight.encoding, weight.parts)
    with pytest.raises(SmeltError, match=r"gather\.affine: the parts hold"):
        look_up(kernel(fewer), fewer, ids)
    other = Weight(weight.shape, weight.encoding, {**weight.parts, "scale": weight.parts["scale"].float()})
    with pytest.raises(SmeltError, match=r"part 'scale' is torch\.float32, not float16"):
        look_up(kernel(other), other, ids)
