"""Queries and keys in Triton: the columns that are read as tiles of their own, their products, and how keys turn."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cache import Site
from .attention_triton_template import ANGLES


@dataclass(frozen=True)
class Pieces:
    """Columns of keys that are read as tiles of their own, (first, count); the first two turn together."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, site: Site) -> Pieces:
        """One piece, unless keys turn when they are read."""
        if site.rope is None or site.frame != "pre":
            return cls(((0, site.key_dim),))
        r = len(site.rope.inverse)
        rest = ((2 * r, site.key_dim - 2 * r),) if 2 * r < site.key_dim else ()
        return cls(((0, r), (r, r), *rest))

    def names(self, name: str) -> str:
        """An argument for each piece."""
        return ", ".join(f"{name}_{i}" for i in range(len(self.spans)))

    def keys(self, call: str, spaces: int, turned: bool) -> str:
        """Lines that set `key_i` to `call`, where `{}` is the piece; `turned`: by `cos` and `sin`."""
        lines = [f"key_{i} = {call.format(i)}" for i in range(len(self.spans))]
        if turned:
            lines.append("key_0, key_1 = key_0 * cos - key_1 * sin, key_1 * cos + key_0 * sin")
        return lined(lines, spaces)


def products(site: Site, pieces: Pieces) -> list[str]:
    """Lines that set the products `s` of queries and a tile of keys."""
    lines = []
    for i in range(len(pieces.spans)):
        operands = f"query_{i}.to(tl.{site.dense}), tl.trans(key_{i}.to(tl.{site.dense}))"
        lines.append(f's = tl.dot({operands}, {"s, " if i else ""}input_precision="ieee")')
    return lines


def query(pieces: Pieces) -> list[str]:
    """Lines that load the queries of the rows `heads`, scaled."""
    lines = []
    for i, (first, count) in enumerate(pieces.spans):
        at = f"q + heads[:, None] + {first} + k" if first else "q + heads[:, None] + k"
        lines.append(f"k = tl.arange(0, {padded(count)})[None, :]")
        lines.append(f"query_{i} = tl.load({at}, mask=inside[:, None] & (k < {count}), other=0)")
        lines.append(f"query_{i} = query_{i}.to(tl.float32) * scale")
    return lines


def angles(pieces: Pieces) -> str:
    """The function that loads cosines and sines."""
    count = pieces.spans[0][1]
    return ANGLES.substitute(turn=count, turn_step=2 * count, turn_pad=padded(count))


def neighbours(count: str, tokens: int) -> list[str]:
    """Lines that find the angles of a tile's `count` tokens, whose positions run from `base` on."""
    return [
        "origin = tl.zeros((1, 1), tl.int32)",
        f"cos_base, sin_base = angles(turns, base + origin, origin < {count})",
        f"shift = tl.arange(0, {tokens})[:, None]",
        f"cos_shift, sin_shift = angles(turns, shift, shift < {count})",
        "cos = cos_base * cos_shift - sin_base * sin_shift",
        "sin = sin_base * cos_shift + cos_base * sin_shift",
    ]


def padded(dim: int) -> int:
    """Columns of a tile: a power of two."""
    return max(16, 1 << (dim - 1).bit_length())


def lined(lines: list[str], spaces: int) -> str:
    """Lines behind so many spaces."""
    return "\n".join(" " * spaces + line for line in lines)
