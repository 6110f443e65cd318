"""Every encoding's expression over a page, printed as C++ by element and by vector, equals its decode."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from smelt.codegen.attention_loaders import row
from smelt.codegen.build import build
from smelt.codegen.printers import cpp
from smelt.codegen.printers.prelude import PRELUDE
from smelt.ir.encoding import Affine, Encoding, Rotated, Sparse
from smelt.ir.encoding.expr import Expr, stored

from ..ir.encoding.examples import EXAMPLES, samples

ROWS, COLUMNS = 64, 64
PRINTED = {name: encoding for name, (encoding, _, _) in EXAMPLES.items() if not isinstance(encoding, Rotated)}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMELT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def printed(name: str, expr: Expr) -> str:
    """Two functions: by element, and by rows of whole vectors."""
    arguments = ", ".join(f"const {cpp.CTYPES[dtype]}* {part}" for part, dtype in stored(expr).items())
    each = f"for (int64_t k = 0; k < {COLUMNS}; k++) out[n * {COLUMNS} + k] = {cpp.scalar(expr)};"
    whole = "\n".join(row(expr, COLUMNS, f"(out + n * {COLUMNS})"))
    return "".join(
        f'extern "C" void {name}_{how}({arguments}, float* out) {{\n'
        f"  for (int64_t n = 0; n < {ROWS}; n++) {{\n{body}\n  }}\n}}\n"
        for how, body in (("scalar", each), ("vector", whole))
    )


def word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def held(encoding: Encoding) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    parts = encoding.alone(samples(rows=ROWS, columns=COLUMNS))
    return parts, encoding.decode(parts, (ROWS, COLUMNS))


def call(library: ctypes.CDLL, name: str, expr: Expr, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.full((ROWS, COLUMNS), float("nan"))
    getattr(library, name)(
        *(ctypes.c_void_p(parts[p].data_ptr()) for p in stored(expr)), ctypes.c_void_p(out.data_ptr())
    )
    return out


@pytest.fixture(scope="module")
def library(_cache: None) -> ctypes.CDLL:
    """All of them in one library: a compiler takes seconds to start."""
    texts = [printed(word(name), encoding.expr((ROWS, COLUMNS))) for name, encoding in PRINTED.items()]
    return build("\n".join([PRELUDE, *texts]), "encodings")


@pytest.mark.parametrize("how", ["scalar", "vector"])
@pytest.mark.parametrize("name", PRINTED)
def test_cpp_equals_decode(library: ctypes.CDLL, name: str, how: str) -> None:
    encoding = PRINTED[name]
    parts, decoded = held(encoding)
    out = call(library, f"{word(name)}_{how}", encoding.expr((ROWS, COLUMNS)), parts)
    assert (out - decoded).abs().max() <= 1e-6 * decoded.abs().max()  # a product and a sum may be one rounding


@pytest.mark.parametrize(
    ("encoding", "right", "wrong"),
    [
        (Sparse(0.05), " == ", " == 1 + "),
        (Sparse(0.05, axis="channel"), " == ", " == 1 + "),
        (Affine(3, 64), " * 4)", " * 2)"),
        (EXAMPLES["pairs"][0], " * 2)", " * 1)"),
        (EXAMPLES["sign"][0], " * 2)", " * 1)"),
    ],
    ids=str,
)
def test_a_wrong_text_is_seen(encoding: Encoding, right: str, wrong: str) -> None:
    expr = encoding.expr((ROWS, COLUMNS))
    text = printed("mutant", expr)
    assert right in text
    library = build(PRELUDE + text.replace(right, wrong), "mutant")
    parts, decoded = held(encoding)
    for how in ("scalar", "vector"):
        assert (call(library, f"mutant_{how}", expr, parts) - decoded).abs().max() > 0.1
