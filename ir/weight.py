"""A stored weight: a logical shape, an encoding and its parts, which may still lie in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from .encoding import Dense, Encoding


@dataclass(frozen=True)
class Mapped(Mapping[str, torch.Tensor]):
    """Parts that lie in safetensors files: each access maps the tensor anew, so that dropping it frees its pages.

    `keys_of` maps a part to (file, key). Nothing is read until a part's values are touched.
    """

    keys_of: Mapping[str, tuple[Path, str]]

    def __getitem__(self, part: str) -> torch.Tensor:
        path, key = self.keys_of[part]
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


@dataclass(frozen=True)
class Transposed(Mapping[str, torch.Tensor]):
    """Dense parts with their two dimensions swapped, read and turned on each access."""

    parts: Mapping[str, torch.Tensor]

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.parts[part].t().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class Upon(Mapping[str, torch.Tensor]):
    """Parts of what stands upon the weight `name` of another program: that weight's, and its `own`.

    The encoding is a sum that begins with the other weight's, whose parts have `a_` before their names; without own
    parts it is the other weight's.
    """

    name: str
    base: Weight
    own: Mapping[str, torch.Tensor]

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.own[part] if part in self.own else self.base.parts[part.removeprefix(self._lead)]

    def __iter__(self) -> Iterator[str]:
        yield from (self._lead + part for part in self.base.parts)
        yield from self.own

    def __len__(self) -> int:
        return len(self.base.parts) + len(self.own)

    @property
    def _lead(self) -> str:
        return "a_" if self.own else ""


@dataclass(frozen=True, eq=False)
class Weight:
    """A logical tensor `shape` stored as `parts` of `encoding`."""

    shape: tuple[int, ...]
    encoding: Encoding
    parts: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Weight:
        """A dense weight over a tensor in memory (shared, not copied)."""
        return cls(tuple(tensor.shape), Dense(str(tensor.dtype).removeprefix("torch.")), {"data": tensor.detach()})

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The decoded tensor; integer and boolean tables keep their own type."""
        return self.encoding.decode(self.parts, self.shape, dtype)

    def encoded(self, encoding: Encoding) -> Weight:
        """The same logical tensor in another encoding."""
        return Weight(self.shape, encoding, encoding.alone(self.dense()))

    @property
    def own(self) -> Mapping[str, torch.Tensor]:
        """The parts without those of a weight that it stands upon."""
        return self.parts.own if isinstance(self.parts, Upon) else self.parts

    @property
    def bits(self) -> int:
        """Stored bits by the encoding's formula, of the own parts."""
        return self._formula() - (self.parts.base._formula() if isinstance(self.parts, Upon) else 0)

    @property
    def nbytes(self) -> int:
        """Measured bytes of the own parts."""
        return sum(part.numel() * part.element_size() for part in self.own.values())

    def merged(self) -> Weight:
        """What stands upon another weight by itself: dense, in that one's type or float16; all else as it is."""
        if not isinstance(self.parts, Upon):
            return self
        base = self.parts.base.merged()
        if not self.parts.own:
            return base
        kind = base.encoding.dtype if isinstance(base.encoding, Dense) else "float16"
        return Weight.of(self.dense(getattr(torch, kind)))

    def _formula(self) -> int:
        return int(self.encoding.stored_bits(self.shape) + self.encoding.table_bits(self.shape))

    def digest(self) -> str:
        """A content hash over encoding, shape and bytes."""
        h = hashlib.sha256(f"{self.encoding}{self.shape}".encode())
        for name in sorted(self.parts):
            part = self.parts[name].reshape(-1)
            h.update(f"{name}{part.dtype}{tuple(self.parts[name].shape)}".encode())
            h.update(part.view(torch.uint8).numpy().data if part.numel() else b"")
        return h.hexdigest()
