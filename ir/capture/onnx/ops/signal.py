"""ONNX signal ops: discrete Fourier transforms as matrix products, windows, and mel filters.

The transforms multiply with a table of cosines and sines instead of torch.fft: complex tensors would need a type that
neither the dialect nor the kernels have.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..registry import DType, Number, Tensor, op


def _turns(rows: int, columns: int, length: int, sign: float) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / length, [rows, columns], in float64."""
    phase = (torch.arange(rows)[:, None] * torch.arange(columns)).remainder(length)
    angle = phase.double() * (2 * math.pi / length)  # computed in the graph: stored tables are read in float32
    return torch.cos(angle), sign * torch.sin(angle)


def _fit(x: Tensor, axis: int, length: int) -> Tensor:
    """x cut or padded with zeros."""
    size = x.shape[axis]
    if size >= length:
        return x.narrow(axis, 0, length)
    grown = list(x.shape)
    grown[axis] = length - size
    return torch.cat([x, x.new_zeros(grown)], axis)


def _transform(x: Tensor, axis: int, length: int, inverse: bool, onesided: bool) -> Tensor:
    """Of x [..., 1 or 2] along an axis that is not the last."""
    if inverse and onesided:
        return _real_inverse(x, axis, length)
    moved = _fit(x, axis, length).double().movedim(axis, -1)  # [..., parts, n]
    cos, sin = _turns(length, length // 2 + 1 if onesided else length, length, 1.0 if inverse else -1.0)
    real = moved[..., 0, :]
    out_r, out_i = real @ cos, real @ sin
    if moved.shape[-2] == 2:
        imaginary = moved[..., 1, :]
        out_r, out_i = out_r - imaginary @ sin, out_i + imaginary @ cos
    out = torch.stack([out_r, out_i], -1) / (length if inverse else 1)
    return out.movedim(-2, axis).to(x.dtype)


def _real_inverse(x: Tensor, axis: int, length: int) -> Tensor:
    bins = length // 2 + 1
    moved = _fit(x, axis, bins).double().movedim(axis, -1)
    cos, sin = _turns(bins, length, length, 1.0)
    twice = torch.full((bins,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if length % 2 == 0:
        twice[-1] = 1.0
    out = (moved[..., 0, :] * twice) @ cos - (moved[..., 1, :] * twice) @ sin
    return (out / length).unsqueeze(-1).movedim(-2, axis).to(x.dtype)


def _dft(x: Tensor, length: float | None, axis: int, inverse: int, onesided: int) -> Tensor:
    axis %= x.dim()
    size = x.shape[axis]
    if length is not None:
        size = int(length)
    elif inverse and onesided:
        size = 2 * (size - 1)
    return _transform(x, axis, size, bool(inverse), bool(onesided))


@op("DFT", since=20)
def dft(
    x: Tensor,
    length: Number | None = None,
    axis: Number = -2,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """The discrete Fourier transform along an axis; real and imaginary parts stand in the last one."""
    return _dft(x, length, int(axis), inverse, onesided)


@op("DFT", since=17)
def dft_17(x: Tensor, length: Number | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    """The discrete Fourier transform, its axis an attribute."""
    return _dft(x, length, axis, inverse, onesided)


@op("STFT")
def stft(
    x: Tensor,
    frame_step: Number,
    window: Tensor | None = None,
    frame_length: Number | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Fourier transforms of overlapping frames of x [B, N, 1 or 2]: [B, frames, bins, 2]."""
    step = int(frame_step)
    if frame_length is not None:
        length = int(frame_length)
    else:
        length = x.shape[1] if window is None else window.shape[0]
    frames = x.unfold(1, length, step).movedim(-1, 2)  # [B, frames, length, parts]
    if window is not None:
        frames = frames * window[:, None]
    return _transform(frames, 2, length, False, bool(onesided))


def _window(size: float, periodic: int, dtype: DType, terms: tuple[float, ...]) -> Tensor:
    count = int(size)
    angle = np.arange(count) * (2 * math.pi / (count if periodic else max(count - 1, 1)))
    values = sum((-1) ** i * term * np.cos(i * angle) for i, term in enumerate(terms))
    return torch.tensor(values, dtype=dtype)


@op("HannWindow")
def hann_window(size: Number, *, output_datatype: DType = torch.float32, periodic: int = 1) -> Tensor:
    """Half a cosine turned upwards."""
    return _window(size, periodic, output_datatype, (0.5, 0.5))


@op("HammingWindow")
def hamming_window(size: Number, *, output_datatype: DType = torch.float32, periodic: int = 1) -> Tensor:
    """Hann's window on a pedestal: 25/46 and 21/46."""
    return _window(size, periodic, output_datatype, (25 / 46, 21 / 46))


@op("BlackmanWindow")
def blackman_window(size: Number, *, output_datatype: DType = torch.float32, periodic: int = 1) -> Tensor:
    """0.42 - 0.5 cos + 0.08 cos of twice the angle."""
    return _window(size, periodic, output_datatype, (0.42, 0.5, 0.08))


@op("MelWeightMatrix")
def mel_weight_matrix(
    num_mel_bins: Number,
    dft_length: Number,
    sample_rate: Number,
    lower_edge_hertz: Number,
    upper_edge_hertz: Number,
    *,
    output_datatype: DType = torch.float32,
) -> Tensor:
    """Triangular filters [spectrum bins, mel bins] that overlap at their centres, all from known numbers."""
    mels, length, rate = int(num_mel_bins), int(dft_length), sample_rate
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    step = (high - low) / (mels + 2)
    hertz = [700 * (10 ** ((low + i * step) / 2595) - 1) for i in range(mels + 2)]
    bins = [int((length + 1) * f // rate) for f in hertz]
    out = np.zeros((length // 2 + 1, mels))
    for i in range(mels):
        left, centre, right = bins[i : i + 3]
        if left == centre:
            out[centre, i] = 1.0
        for at in range(left, centre + 1):
            out[at, i] = (at - left) / (centre - left) if centre > left else 1.0
        for at in range(centre, right):
            out[at, i] = (right - at) / (right - centre)
    return torch.tensor(out, dtype=output_datatype)
