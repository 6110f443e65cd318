"""Puts the Triton cut cross-entropy behind `smelt::head_cross_entropy` for tensors on a CUDA device."""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec

import torch

from ..ir.ops import loss
from . import loss_triton
from .device_triton import interpreted
from .loss_triton import Tile, TritonLoss


class TritonKernels:
    """The op's kernels, compiled when they are first used; exact: no block of logits is skipped."""

    def __init__(self, tile: Tile | None = None) -> None:
        self._tile = tile

    @cached_property
    def _cut(self) -> TritonLoss:
        return TritonLoss(tile=self._tile)

    def covers(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Why these operands have no kernel, or None."""
        if x.is_cuda and interpreted():
            return "Triton interprets its kernels in this process"
        return loss_triton.covers(x, weight)

    def loss(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """The loss of each token, float32 [N]; labels of tokens without one are -1."""
        return self._cut.losses(x, weight, labels, bias, softcap)[0]

    def gradients(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        logsum: torch.Tensor,
        grad: torch.Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of x, weight and bias, those `wanted`."""
        return self._cut.gradients(x, weight, labels, bias, softcap, logsum, grad, wanted)


def register() -> None:
    """From now on the op takes these kernels on CUDA devices, if Triton is installed; once is enough."""
    if "cuda" not in loss.KERNELS and find_spec("triton") is not None:
        loss.KERNELS["cuda"] = TritonKernels()
