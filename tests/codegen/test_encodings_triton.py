"""Every encoding's expression in Triton: a page's tile equals decode, and products with weights are fused."""

import pytest
import torch

from smelt.codegen.printers import triton as printer
from smelt.ir.encoding import Affine, Encoding, LowRank, Nonuniform, Rotated, Sparse, Sum
from smelt.ir.encoding.expr import stored

from ..ir.encoding.examples import EXAMPLES, samples
from .triton_checks import compiled, in_the_interpreter, interpreted

pytest.importorskip("triton", reason="triton is not installed")

ROWS, COLUMNS = 64, 64
PRINTED = {name: encoding for name, (encoding, _, _) in EXAMPLES.items() if not isinstance(encoding, Rotated)}
WEIGHTS = {
    "signposts": Nonuniform(2, kind="normal"),
    "a sum": Sum((Affine(8, 0), LowRank(2), Sparse(2))),
}


def decoded(encoding: Encoding, parts: dict[str, torch.Tensor], right: str = "", wrong: str = "") -> torch.Tensor:
    """A page, decoded by one program; `wrong` replaces `right` in its text."""
    from smelt.codegen.triton_module import load

    expr = encoding.expr((ROWS, COLUMNS))
    value = printer.text(expr)
    assert right in value
    module = load(
        f"import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef decode({', '.join(stored(expr))}, out):\n"
        f"    n, k = tl.arange(0, {ROWS})[:, None], tl.arange(0, {COLUMNS})[None, :]\n"
        f"    value = {value.replace(right, wrong) if right else value}\n"
        f"    tl.store(out + n * {COLUMNS} + k, tl.broadcast_to(value, ({ROWS}, {COLUMNS})))\n",
        "decode",
    )
    out = torch.full((ROWS, COLUMNS), float("nan"))
    module.decode[(1,)](*(parts[part] for part in stored(expr)), out)
    return out


@interpreted
@pytest.mark.parametrize("name", PRINTED)
def test_a_page_equals_decode(name: str) -> None:
    encoding = PRINTED[name]
    parts = encoding.alone(samples(rows=ROWS, columns=COLUMNS))
    wanted = encoding.decode(parts, (ROWS, COLUMNS))
    assert (decoded(encoding, parts) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@interpreted
@pytest.mark.parametrize(
    ("name", "right", "wrong"), [("sparse", " == k", " == k + 1"), ("three bits", " * 4)", " * 2)")]
)
def test_a_wrong_text_is_seen(name: str, right: str, wrong: str) -> None:
    encoding = PRINTED[name]
    parts = encoding.alone(samples(rows=ROWS, columns=COLUMNS))
    assert (decoded(encoding, parts, right, wrong) - encoding.decode(parts, (ROWS, COLUMNS))).abs().max() > 0.1


@interpreted
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_equal_decode(name: str) -> None:
    from smelt.codegen.autotune_triton import Tile
    from smelt.codegen.gemm_triton import TritonProduct
    from smelt.codegen.product_triton import Product

    encoding, random = WEIGHTS[name], torch.Generator().manual_seed(0)
    w = torch.randn(33, 128, generator=random)
    parts, product = encoding.alone(w), TritonProduct(Product(encoding, act="relu"))
    weights = encoding.decode(parts, (33, 128))
    for m in (1, 9):
        x, out = torch.randn(m, 128, generator=random), torch.full((m, 33), float("nan"))
        product(parts, x, out, tile=Tile(block_n=16, block_k=64) if m < 5 else None)
        wanted = (x.double() @ weights.double().t()).relu()
        assert (out - wanted).abs().max() < 2e-5 * wanted.abs().max()
    first = next(iter(parts))
    product({**parts, first: parts[first].flip(0)}, x, out)
    assert (out - wanted).abs().max() > 0.1 * wanted.abs().max()


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)
