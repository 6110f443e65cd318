"""Kernels that go over rows: the norm with a residual, rotary with the cache's append, and encoding a page."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from smelt.codegen import encode_triton, rows_triton
from smelt.ir.encoding import Affine
from smelt.ir.ops.rotary import rotary

from .contest import Contest, Entry, Makers, Outputs, Run, Settings, equal, worst

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
NORMS = {False: ((1, 4096), (4096, 4096)), True: ((3, 129),)}  # by whether shapes are tiny: rows and columns
HEADS = {False: (32, 32, 8, 128), True: (2, 4, 2, 32)}  # rows, query heads, key heads, channels
PAGES = {False: (256, 64, 128), True: (3, 32, 64)}  # pages, tokens, channels


def contests(settings: Settings) -> Iterator[Contest]:
    """Exact where codes are chosen, else within the rounding of the type."""
    tolerance = TOLERANCE[settings.half]
    for m, k in NORMS[settings.tiny]:
        yield Contest(f"residual and norm, {m} x {k}", tolerance, partial(_norm, settings, m, k), worst)
    rows, heads, groups, dim = HEADS[settings.tiny]
    label = f"rotary and append, {rows} rows, {heads} + {groups} heads of {dim}"
    yield Contest(label, tolerance, partial(_rotary, settings, rows, heads, groups, dim), worst)
    pages, tokens, dim = PAGES[settings.tiny]
    for name, encoding in (
        ("keys", Affine(4, tokens // 2, "channel", True)),
        ("values", Affine(4, dim // 2, "token", True)),
    ):
        yield Contest(f"encode {name} by 4 bits, {pages} x {tokens} x {dim}", 0.0,
                      partial(_encode, settings, encoding, (pages, tokens, dim)), equal)  # fmt: skip


def _norm(settings: Settings, m: int, k: int) -> Makers:
    shapes = (m, k), (m, k), (k,)
    x, stream, gain = (torch.randn(*shape, device=settings.device).to(settings.half) for shape in shapes)
    total = x + stream
    right = (total, functional.rms_norm(total.double(), (k,), gain.double(), 1e-5))
    nbytes = (4 * m + 1) * k * x.element_size()

    def launch(offset: float) -> Run:
        outputs = [torch.full_like(x, float("nan")) for _ in range(2)]

        def run() -> Outputs:
            rows_triton.rms_norm(x, outputs[1], gain, 1e-5, offset, stream, outputs[0])
            return outputs

        return run

    def eager() -> Outputs:
        added = x + stream
        return added, functional.rms_norm(added, (k,), gain, 1e-5)

    makers = {"smelt": lambda: Entry(launch(0.0), right, launch(0.05), nbytes)}
    return makers | ({"torch": lambda: Entry(eager, right, None, nbytes)} if settings.rivals else {})


def _rotary(settings: Settings, rows: int, heads: int, groups: int, dim: int) -> Makers:
    """q, k and v are views of one projection; row b has b tokens in its tail."""
    device, width = settings.device, rows + 1
    joined = torch.randn(rows, 1, (heads + 2 * groups) * dim, device=device).to(settings.half)
    q, k, v = (part.unflatten(2, (-1, dim)).transpose(1, 2) for part in
               joined.split([heads * dim, groups * dim, groups * dim], 2))  # fmt: skip
    counts = torch.zeros(rows, 4, dtype=torch.int32, device=device)
    counts[:, 2] = slots = torch.arange(rows, device=device)
    positions = (1000 + slots)[:, None].contiguous()
    frequencies = 10000.0 ** (-torch.arange(dim // 2, device=device) * 2 / dim)
    at = slots[:, None, None, None].expand(rows, groups, 1, dim)
    turned = [rotary(each.double(), positions, frequencies) for each in (q, k)]
    right = (turned[0], turned[1], v)
    nbytes = 2 * joined.numel() * joined.element_size()

    def launch(by: float, back: bool) -> Run:
        """`back`: read what went to the tails, which is no part of the kernel."""
        out = torch.full_like(q, float("nan"))
        tails = torch.full((2, rows, groups, width, dim), float("nan"), dtype=q.dtype, device=device)
        tail_k, tail_v = tails.unbind()

        def run() -> Outputs:
            rows_triton.rotate_append(q, k, v, out, tail_k, tail_v, positions, counts, frequencies, by)
            return (out, tail_k.gather(2, at), tail_v.gather(2, at)) if back else (out,)

        return run

    return {"smelt": lambda: Entry(launch(1.0, True), right, launch(1.05, True), nbytes, alone=launch(1.0, False))}


def _encode(settings: Settings, encoding: Affine, shape: tuple[int, int, int]) -> Makers:
    x = torch.randn(*shape, device=settings.device).to(settings.half)
    want = encoding.encode(x)
    nbytes = x.numel() * x.element_size() + int(encoding.stored_bits(shape)) / 8

    def launch(given: torch.Tensor) -> Run:
        parts = {name: torch.full_like(part, 255 if part.dtype is torch.uint8 else float("nan"))
                 for name, part in want.items()}  # fmt: skip

        def run() -> Outputs:
            encode_triton.encode(encoding, given, parts)
            return list(parts.values())

        return run

    right = list(want.values())
    makers = {"smelt": lambda: Entry(launch(x), right, launch(x * 1.05), nbytes)}
    eager = {"torch": lambda: Entry(lambda: list(encoding.encode(x).values()), right, None, nbytes)}
    return makers | (eager if settings.rivals else {})
