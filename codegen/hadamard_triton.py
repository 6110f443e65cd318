"""The fast Walsh-Hadamard transform of rows on a GPU, in Triton: a program turns whole blocks in its registers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .plan import Out, Run
from .triton_module import load

LARGEST, TILE = 1 << 13, 1 << 10  # numbers of a block, and at least so many for a program


@dataclass(frozen=True)
class HadamardKernel:
    """`hadamard`: blocks of neighbours times H / √size."""

    name: str = "triton.hadamard"

    @property
    def source(self) -> str:
        return SOURCE

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if args["x"].is_contiguous() else ("x",)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        x, size = args["x"], int(args["size"])
        blocks, rows = x.numel() // size, max(1, TILE // size)
        grid = (-(-blocks // rows),)
        sides = {"ROWS": rows, "SIZE": size, "ROUNDS": size.bit_length() - 1}
        return lambda: _module().hadamard[grid](x, out, blocks, 1 / math.sqrt(size), **sides)


@cache
def _module() -> Any:
    return load(SOURCE, "hadamard")


SOURCE = '''\
"""Blocks of neighbours times a Hadamard matrix of ones and minus ones, times a factor"""

import triton
import triton.language as tl


@triton.jit
def hadamard(x, y, M, factor, ROWS: tl.constexpr, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = m * SIZE + tl.arange(0, SIZE)[None, :]
    v = tl.load(x + at, mask=m < M, other=0).to(tl.float32)
    for _ in tl.static_range(ROUNDS):  # each takes the last bit of the place, and puts it first
        even, odd = tl.split(tl.reshape(v, (ROWS, SIZE // 2, 2)))
        v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    tl.store(y + at, v * factor, mask=m < M)
'''
