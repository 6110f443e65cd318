"""Products with weights in every encoding: one row of x, few and many; alone and gated behind a norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from smelt.codegen.gemm_triton import TritonProduct
from smelt.codegen.product_triton import Product
from smelt.ir.encoding import Affine, Dense, Encoding

from .contest import Bar, Contest, Entry, Makers, Outputs, Run, Settings, worst

Parts = dict[str, torch.Tensor]
ENCODINGS: dict[str, Encoding] = {
    "affine4 g128": Affine(4, 128),
    "affine4 g64": Affine(4, 64),
    "fp16": Dense("float16"),
    "affine8": Affine(8, 0),
    "affine2": Affine(2, 64, zero=True),
}
HEADLINE = "affine4 g128"
# rows of x: outputs and columns; the bar's shape first, then what batches and prompts have
SHAPES = {1: (16384, 16384), 4: (8192, 8192), 16: (8192, 8192), 64: (8192, 8192), 2048: (8192, 8192)}
TINY = {1: (48, 128), 70: (48, 128)}
GATED = {1: (14336, 4096), 16: (14336, 4096)}
TINY_GATED = {1: (48, 128), 17: (48, 128)}
# relative to a value and the mean size: weights and results are rounded to 8 or 11 bits, and a gate multiplies two
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
GATE = 4


def contests(settings: Settings) -> Iterator[Contest]:
    """The bar's first, then by rows."""
    tolerance = TOLERANCE[settings.half]
    bar = Bar("smelt tuned", 2.6, ("torch bf16",))
    for m, (n, k) in (TINY if settings.tiny else SHAPES).items():
        for label, encoding in ENCODINGS.items():
            yield Contest(
                f"{label}, {m} x {n} x {k}",
                tolerance,
                partial(_plain, settings, encoding, m, n, k, label == HEADLINE),
                worst,
                bar if label == HEADLINE and m == 1 else None,
            )
    for m, (n, k) in (TINY_GATED if settings.tiny else GATED).items():
        yield Contest(f"norm, silu gate, {HEADLINE}, {m} x {n} x {k}", GATE * tolerance,
                      partial(_gated, settings, m, n, k), worst)  # fmt: skip


def _plain(settings: Settings, encoding: Encoding, m: int, n: int, k: int, tuned: bool) -> Makers:
    weight = torch.randn(n, k, device=settings.device) / k**0.5
    parts = encoding.encode(weight)
    weight = encoding.decode(parts, (n, k))
    x = torch.randn(m, k, device=settings.device).to(settings.half)
    right = (x.double() @ weight.double().t(),)
    around, flops = 2 * m * (n + k), 2.0 * m * n * k

    def ours(tune: bool) -> Entry:
        kernels = TritonProduct(encoding, tune)
        nbytes = int(encoding.stored_bits((n, k))) / 8 + around
        good, bad = (launch(kernels, x, n, some) for some in (parts, scaled(parts)))
        return Entry(good, right, bad, nbytes, flops)

    def dense(dtype: torch.dtype) -> Entry:
        w, given = weight.to(dtype), x.to(dtype)
        return Entry(lambda: (functional.linear(given, w),), right, None, 2 * n * k + around, flops)

    makers: dict[str, Callable[[], Entry]] = {"smelt": partial(ours, False)}
    if settings.tune or (tuned and not settings.tiny):
        makers["smelt tuned"] = partial(ours, True)
    if settings.rivals:
        makers["torch bf16"] = partial(dense, torch.bfloat16)
        if m == 1:
            makers["torch fp16"] = partial(dense, torch.float16)
        if isinstance(encoding, Affine) and encoding.width == 4:
            makers["gemlite"] = partial(_gemlite, encoding, parts, weight, x.half(), right, around, flops)
    return makers


def _gated(settings: Settings, m: int, n: int, k: int) -> Makers:
    encoding = ENCODINGS[HEADLINE]
    encoded = [encoding.encode(torch.randn(n, k, device=settings.device) / k**0.5) for _ in range(2)]
    gate, up = (encoding.decode(parts, (n, k)) for parts in encoded)
    x = torch.randn(m, k, device=settings.device).to(settings.half)
    gain = (1 + 0.1 * torch.randn(k, device=settings.device)).to(settings.half)
    normed = functional.rms_norm(x.double(), (k,), gain.double(), 1e-5)
    right = (functional.silu(normed @ gate.double().t()) * (normed @ up.double().t()),)
    around, flops = 2 * m * (n + k), 4.0 * m * n * k

    def ours() -> Entry:
        kernels = TritonProduct(Product(encoding, up=encoding, norm=True, act="silu"), settings.tune)
        good = launch(kernels, x, n, encoded[0], up=encoded[1], gain=gain, eps=1e-5)
        bad = launch(kernels, x, n, scaled(encoded[0]), up=scaled(encoded[1]), gain=gain, eps=1e-5)
        return Entry(good, right, bad, 2 * int(encoding.stored_bits((n, k))) / 8 + around, flops)

    def dense() -> Entry:
        first, second, weight = gate.bfloat16(), up.bfloat16(), gain.bfloat16()
        given = x.bfloat16()

        def run() -> Outputs:
            inner = functional.rms_norm(given, (k,), weight, 1e-5)
            return (functional.silu(functional.linear(inner, first)) * functional.linear(inner, second),)

        return Entry(run, right, None, 4 * n * k + around, flops)

    return {"smelt": ours} | ({"torch bf16": dense} if settings.rivals else {})


def scaled(parts: Mapping[str, torch.Tensor], by: float = 1.05) -> Parts:
    """The parts of a weight that is wrong by 5 %."""
    return {name: part * by if part.is_floating_point() else part for name, part in parts.items()}


def launch(kernels: TritonProduct, x: torch.Tensor, n: int, parts: Parts, **options: Any) -> Run:
    """A launch into an output of its own; what it leaves out stays NaN."""
    out = x.new_full((len(x), n), float("nan"))

    def run() -> Outputs:
        kernels(parts, x, out, **options)
        return (out,)

    return run


def _gemlite(
    encoding: Affine, parts: Parts, weight: torch.Tensor, x: torch.Tensor, right: Outputs, around: int, flops: float
) -> Entry:
    """The package's 4-bit kernels over the same codes and scales."""
    from gemlite import DType, GemLiteLinear

    n, k = weight.shape
    scale = parts["scale"].reshape(-1, 1)
    codes = (weight.reshape(-1, encoding.group) / scale.float()).round_() + 8
    linear = GemLiteLinear(
        encoding.width, group_size=encoding.group, in_features=k, out_features=n, input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )  # fmt: skip
    linear.pack(codes.to(torch.uint8).reshape(n, k), scale, torch.full_like(scale, 8), None)
    return Entry(lambda: (linear(x),), right, None, int(encoding.stored_bits((n, k))) / 8 + around, flops)
