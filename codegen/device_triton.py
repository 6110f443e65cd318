"""Where Triton kernels run: on the CUDA device, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from ..ir.errors import SmeltError
from ..ir.weight import Weight


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process; it reads the variable once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> torch.device:
    """The device of target triton in this process; SmeltError where it has none."""
    if find_spec("triton") is None:
        raise SmeltError("target triton needs the package triton: pip install 'smelt[gpu]', or choose target cpp")
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SmeltError(
            "target triton needs a CUDA device, and torch.cuda.is_available() is false: choose target cpp, or set "
            "TRITON_INTERPRET=1 to run the same kernels on the CPU, slowly, as tests do"
        )
    return torch.device("cuda", torch.cuda.current_device())


def likely() -> torch.device:
    """As `device`, but the CPU where there is none: a plan can be made and read there, though not run."""
    if torch.cuda.is_available() and not interpreted():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Placed(Mapping[str, torch.Tensor]):
    """A weight's parts on a device, contiguous; each is taken there when it is first asked for, and kept."""

    parts: Mapping[str, torch.Tensor]
    device: torch.device
    held: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, part: str) -> torch.Tensor:
        if part not in self.held:
            self.held[part] = self.parts[part].to(self.device).contiguous()
        return self.held[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True, eq=False)
class Stacked(Mapping[str, torch.Tensor]):
    """The parts of several weights below each other; made anew on each access."""

    each: Sequence[Mapping[str, torch.Tensor]]

    def __getitem__(self, part: str) -> torch.Tensor:
        return torch.cat([parts[part] for parts in self.each])

    def __iter__(self) -> Iterator[str]:
        return iter(self.each[0])

    def __len__(self) -> int:
        return len(self.each[0])


def on_host(parts: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The parts as they lay before they were placed: to be looked at without a copy to the device."""
    return parts.parts if isinstance(parts, Placed) else parts


def below(each: Sequence[Mapping[str, torch.Tensor]]) -> Placed:
    """Placed parts of several weights as one weight's, below each other: on the device they lie only so."""
    first = each[0]
    assert isinstance(first, Placed)
    return Placed(Stacked([on_host(parts) for parts in each]), first.device)


def placed(weight: Weight, to: torch.device) -> Weight:
    """The weight in its encoding on a device; nothing is copied before it is read."""
    return Weight(weight.shape, weight.encoding, Placed(weight.parts, to))
