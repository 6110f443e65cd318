"""Weights as MatMulNBits and GatherBlockQuantized read them: packed rows of codes, and a float32 scale a block of K."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...ir.encoding import Affine
from ...ir.weight import Weight
from .builder import Builder, onnx_type
from .weights import codes

# Widths of blocks for which onnxruntime 1.31 has integer products on a CPU, by the bits of a code; others are allowed
# up to 256, but it decodes the whole matrix for them: 1.8 ms in place of 12 µs for 1024 x 1024 (EPYC, 2026-11-21).
BLOCKS = {2: (128, 64, 32), 4: (256, 128, 64, 32, 16), 8: (256, 128, 64, 32, 16)}


@dataclass(frozen=True)
class Blocks:
    """How matrices `[N, columns]` are cut: `bits` a code, `block` codes a scale."""

    bits: int
    block: int
    columns: int


def blocks(weights: Sequence[Weight], most: int = 256) -> Blocks | None:
    """The widest blocks that fit matrices of one product, which may differ in their groups; None if none do.

    A block is never wider than a group: a group's scale is repeated for each of its blocks.
    """
    shapes, encodings = [weight.shape for weight in weights], [weight.encoding for weight in weights]
    affine = [e for e in encodings if isinstance(e, Affine) and e.axis == "token" and not e.zero and e.planes == 1]
    if len(affine) < len(encodings) or any(len(shape) != 2 for shape in shapes):
        return None
    widths, columns = {e.width for e in affine}, {shape[1] for shape in shapes}
    if len(widths) > 1 or len(columns) > 1:
        return None
    bits, width = widths.pop(), columns.pop()
    common = math.gcd(*(e.group or width for e in affine))
    fits = (block for block in BLOCKS[bits] if block <= most and common % block == 0)
    block = next(fits, None)
    return None if block is None else Blocks(bits, block, width)


def block_tensors(builder: Builder, named: Mapping[str, Weight], cut: Blocks, flat: bool = False) -> tuple[str, str]:
    """Initialisers of matrices one below the other: codes uint8 `[N, K / block, bytes]` and scales `[N, K / block]`.

    `flat`: codes `[N, bytes]`, as a lookup wants them.
    """
    names, weights = tuple(named), tuple(named.values())
    rows, count = sum(weight.shape[0] for weight in weights), cut.columns // cut.block
    size = cut.block * cut.bits // 8

    def read_codes() -> bytes:
        return b"".join(_bytes(_packed(codes(weight), cut.bits)) for weight in weights)

    def read_scales() -> bytes:
        return b"".join(_bytes(_scales(weight, cut)) for weight in weights)

    def make() -> tuple[str, str]:
        hint = "+".join(names)
        dims = (rows, count * size) if flat else (rows, count, size)
        data = builder.tensor(hint, onnx_type(torch.uint8), dims, rows * count * size, read_codes)
        kind = onnx_type(torch.float32)
        return data, builder.tensor(f"{hint}.scales", kind, (rows, count), 4 * rows * count, read_scales)

    made: tuple[str, str] = builder.once(("blocks", names, cut, flat), make)
    return made


def _packed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, one a byte, with neighbours in one byte, the first in its lowest bits."""
    parts = fields.unflatten(-1, (-1, 8 // bits))
    packed: torch.Tensor = parts[..., 0].clone()
    for at in range(1, 8 // bits):
        packed |= parts[..., at] << (bits * at)
    return packed


def _scales(weight: Weight, cut: Blocks) -> torch.Tensor:
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    scale = weight.parts["scale"].float().reshape(weight.shape[0], -1)
    return scale.repeat_interleave((encoding.group or cut.columns) // cut.block, dim=1)


def _bytes(value: torch.Tensor) -> bytes:
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
