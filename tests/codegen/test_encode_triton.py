"""The Triton encoder: bit for bit what `Affine.encode` makes, in the interpreter; compiled for sm_80 and sm_90."""

from pathlib import Path

import pytest
import torch

from smelt.codegen import encode_triton
from smelt.codegen.autotune_triton import Tile
from smelt.ir.encoding import Affine, Dense
from smelt.ir.errors import SmeltError

from . import triton_checks as checks
from .triton_checks import compiled, interpreted

pytest.importorskip("triton", reason="triton is not installed")

CASES = {
    "values": (Affine(4, 32, zero=True), (63, 64)),
    "symmetric": (Affine(4, 64), (1, 192)),
    "two bits": (Affine(2, 64, zero=True), (129, 128)),
    "odd groups": (Affine(8, 3, zero=True), (5, 63)),
    "whole rows": (Affine(8, 0), (63, 129)),
    "wide scales": (Affine(4, 0, zero=True, scale="float32"), (7, 96)),
    "several groups a byte": (Affine(4, 8), (9, 64)),
    "groups across blocks": (Affine(4, 48, zero=True), (3, 96)),
    "keys": (Affine(4, 32, "channel", True), (96, 64)),
    "keys by 63": (Affine(8, 63, "channel"), (126, 33)),
    "keys in two bits": (Affine(2, 128, "channel", True), (128, 64)),
}
# the interpreter cuts bfloat16 off where a GPU rounds to the nearest
ON_GPU = {**CASES, "bfloat16": (Affine(4, 32, zero=True, scale="bfloat16"), (63, 64))}
COMPILED = {
    "keys": (Affine(4, 64, "channel", True), (64, 128)),
    "values": (Affine(4, 64, zero=True), (64, 128)),
    "keys in two bits": (Affine(2, 128, "channel", True), (128, 128)),
    "several groups a byte": (Affine(4, 16), (64, 128)),
}


def wrong(encoding: Affine, shape: tuple[int, int], device: str = "cpu") -> int:
    """Elements of all parts that differ: of plain pages, of one that is constant in part, and of one of tiny values.

    The pages lie in a longer tail and go to every other slot of a longer body, filled with NaN and with a wrong code.
    """
    n, k = shape
    tail = torch.randn(4, n + 5, k, generator=torch.Generator().manual_seed(n)).to(device)
    x = tail[:, 2 : n + 2]
    x *= torch.tensor([1.0, 300.0, 1e-7, 1.0], device=device)[:, None, None]
    x[1, 0], x[3] = 0.25, 0
    right = encoding.encode(x.contiguous())
    bodies = {
        part: torch.full((4, 2, *each.shape[1:]), 77 if part == "codes" else float("nan"), dtype=each.dtype)
        for part, each in right.items()
    }
    parts = {part: body.to(device)[:, 1] for part, body in bodies.items()}
    encode_triton.encode(encoding, x, parts)
    return sum(int((parts[part] != each).sum()) for part, each in right.items())


@interpreted
@pytest.mark.parametrize(("encoding", "shape"), CASES.values(), ids=CASES)
def test_encodes_as_the_reference_does(encoding: Affine, shape: tuple[int, int]) -> None:
    assert wrong(encoding, shape) == 0


@interpreted
@pytest.mark.parametrize("name", ["values", "keys", "several groups a byte"])
@pytest.mark.parametrize(
    ("right", "mutant"),
    [
        (" << 4", " << 3"),
        ("+ 12582912.0) - 12582912.0", "+ 12582912.0) - 12582911.0"),
        ("scale * 15.0 < span", "scale * 0.0 > span"),
        ("scale * 7.0 < span", "scale * 0.0 > span"),
    ],
)
def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, right: str, mutant: str) -> None:
    encoding, shape = CASES[name]
    text = encode_triton.source(encoding, shape)
    if right not in text and right.startswith("scale"):
        pytest.skip("the other kind of codes")
    assert right in text
    encode_triton.kernel.cache_clear()
    monkeypatch.setattr(encode_triton, "source", lambda encoding, shape: text.replace(right, mutant))
    assert wrong(encoding, shape) > 0
    encode_triton.kernel.cache_clear()


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    checks.in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("encoding", "shape"), COMPILED.values(), ids=COMPILED)
def test_compiles_without_a_spill(
    encoding: Affine, shape: tuple[int, int], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernel, types = encode_triton.kernel(encoding, shape), encode_triton.signature(encoding, "float16")
    tile = Tile(warps=encode_triton.warps(encoding, shape))
    used = checks.usage(kernel, types, {}, tile, capability, tmp_path)
    assert used.spilled == 0 and used.registers <= 128 and used.shared <= 48 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize(("encoding", "shape"), ON_GPU.values(), ids=ON_GPU)
def test_encodes_as_the_reference_does_on_a_gpu(encoding: Affine, shape: tuple[int, int]) -> None:
    assert wrong(encoding, shape, "cuda") == 0


@interpreted
def test_pages_are_encoded_as_a_cache_does() -> None:
    """Several heads and pages at once; an encoding without a kernel encodes itself."""
    x = torch.randn(2, 3, 8, 32, generator=torch.Generator().manual_seed(0))
    for encoding in (Affine(8, 4, "channel", True), Affine(4, 16), Affine(5, 8, "channel"), Dense("float16")):
        found, wanted = encode_triton.encoded(encoding, x), encoding.encode(x)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], part) and found[name].dtype is part.dtype for name, part in wanted.items())


def test_what_the_encoding_refuses_is_refused() -> None:
    with pytest.raises(SmeltError, match="must be a multiple of 32"):
        encode_triton.source(Affine(4, 32), (64, 48))
    for bits in (3, 5, 6):
        with pytest.raises(SmeltError, match="its codes lie in two planes"):
            encode_triton.source(Affine(bits, 64), (64, 64))
    with pytest.raises(SmeltError, match="must be contiguous"):
        encode_triton.encode(Affine(8, 0), torch.zeros(1, 4, 8).mT, Affine(8, 0).encode(torch.zeros(1, 8, 4)))
