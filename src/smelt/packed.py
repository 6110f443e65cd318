"""The pack-quantized layout of compressed-tensors: integer codes of matrices as int32 words, with scales beside them.

A row is a stream of bits: code j stands at bits j * b, lowest bit first, as q + 2^(b-1); rows are filled up to whole
words. `weight_scale` is [N, K / group], `weight_shape` the matrix's own. Zero points are integers in units of the
scale, which the zeros of an `Affine`, values of the matrix, are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .ir.encoding import Affine, packing
from .ir.weight import Weight

FORMAT = "pack-quantized"
PIECE = 1 << 22  # codes packed at once: their bits lie apart for a moment


@dataclass(frozen=True, order=True)
class Scheme:
    """What the layout says of matrices that are stored alike: bits of a code, and inputs of a scale (0: the row)."""

    bits: int
    group: int

    def entry(self, targets: list[str]) -> dict[str, Any]:
        """The group of the configuration that names these modules."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        plain = {"input_activations": None, "output_activations": None, "format": FORMAT}
        return {"targets": targets, "weights": weights, **plain}


def configuration(packed: Mapping[str, Scheme], products: Iterable[str]) -> dict[str, Any]:
    """What readers look up: the modules of each scheme, of packed weights by name, and the products that are dense."""
    modules: dict[Scheme, list[str]] = {}
    for name, kind in packed.items():
        modules.setdefault(kind, []).append(name.removesuffix(".weight"))
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{at}": kind.entry(names) for at, (kind, names) in enumerate(sorted(modules.items()))},
        "ignore": [name for name in products if f"{name}.weight" not in packed],
        "kv_cache_scheme": None,
    }


def scheme(weight: Weight) -> Scheme | str:
    """How the layout says this matrix, or why it cannot and what would."""
    encoding = weight.encoding
    if not isinstance(encoding, Affine) or encoding.axis != "token":
        return f"is stored as {encoding}, and the layout has integers in groups of a row alone (weights.quantize)"
    if encoding.zero:
        return "has zeros that are no integers, as the layout's are: set zero: false"
    if len(weight.shape) != 2:
        return f"has the shape {list(weight.shape)}, and the layout holds matrices"
    return Scheme(encoding.width, 0 if encoding.group == weight.shape[1] else encoding.group)


def pack(weight: Weight, wanted: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one matrix; a group of `wanted` divides its own, whose scale is then repeated."""
    rows, columns = weight.shape
    codes = packing.unpack(weight.parts, wanted.bits, columns)
    words = [_words(piece, wanted.bits) for piece in codes.split(max(1, PIECE // columns))]
    scale = weight.parts["scale"]
    groups = columns // wanted.group if wanted.group else 1
    return {
        "weight_packed": torch.cat(words),
        "weight_scale": scale.repeat_interleave(groups // scale.shape[1], 1).contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, K] as int32 [N, ceil(K * bits / 32)]."""
    apart = codes[..., None] >> torch.arange(bits, dtype=torch.uint8) & 1
    packed = np.packbits(apart.flatten(-2).numpy(), axis=-1, bitorder="little")
    whole = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(whole.view("<i4").astype(np.int32, copy=False))
