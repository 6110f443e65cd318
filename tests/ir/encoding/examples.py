"""One of each kind of encoding, and what tests of all of them need."""

import torch

from smelt.ir.encoding import (
    NM,
    Affine,
    ChannelScaled,
    Codebook,
    Encoding,
    LowRank,
    Masked,
    Nonuniform,
    Rotated,
    Sign,
    Sparse,
    Sum,
)

OUTLIERS = Sum((Affine(2, 64, "channel", True), LowRank(4), Sparse(0.02)), "outliers")
# signal to noise on `samples`, in dB: as measured, 0.8 below and above
EXAMPLES: dict[str, tuple[Encoding, float, float]] = {
    "three bits": (Affine(3, 64, zero=True), 10.1, 11.7),
    "signposts": (Nonuniform(3), 10.8, 12.4),
    "signposts matched": (Nonuniform(2, axis="channel", group=64, qnorm=True), 9.2, 10.8),
    "a Gaussian's": (Nonuniform(4, kind="normal", group=32, zero=False), 11.3, 12.9),
    "by channel, calibrated": (Nonuniform(3, axis="channel", range="calibrated", clip=0.01), 14.7, 16.3),
    "ranges alone": (Nonuniform(3, axis="channel", range="calibrated", kind="normal", scale="float32"), 14.4, 16.0),
    "pairs": (Codebook(2, 4), 12.3, 13.9),
    "wide codes": (Codebook(4, 9, shared=True), 15.4, 17.0),
    "banks": (Codebook(2, 4, shared=True, norm=True, banks=4), 10.3, 11.9),
    "a grid": (Codebook(2, 8, kind="gaussian", norm=True), 11.5, 13.1),
    "sparse": (Sparse(0.05), 2.9, 4.5),
    "by channel": (Sparse(0.05, axis="channel"), 1, 2),
    "outliers of channels": (
        Sum((Affine(2, 64, "channel", True), LowRank(4), Sparse(0.03, axis="channel")), "outliers"), 11.3, 12.9),
    "listed": (Sparse(3, "magnitude", index="int16"), 2.6, 4.2),
    "low rank": (LowRank(4), 2.4, 4.0),
    "low rank in four bits": (LowRank(4, factors=Affine(4, 0)), 2.3, 3.9),
    "codes behind a low rank": (Sum((LowRank(2, factors=Affine(4, 0)), Affine(3, 64, "channel", True))), 16.3, 17.9),
    "outliers in a byte": (Sparse(0.05, axis="channel", values=Affine(8, 0)), 1, 2),
    "a corrected cache": (
        Sum((LowRank(1, factors=Affine(4, 0)), Affine(3, 64, zero=True),
             Sparse(0.02, values=Affine(8, 64, "channel"))), "outliers"), 16.4, 18.0),
    "two of four": (NM(2, 4), 10.3, 11.9),
    "two of four in four bits": (NM(2, 4, Affine(4, 32)), 9.2, 10.8),
    "masked": (Masked(Affine(4, 32)), 15.6, 17.2),
    "sign": (Sign(32), 1.9, 3.5),
    "a sum": (Sum((Affine(2, 64, "channel", True), LowRank(4), Sparse(0.02))), 10.0, 11.6),
    "outliers first": (OUTLIERS, 10.0, 11.6),
    "fitted and sparse": (Sum((Nonuniform(2, axis="channel", range="calibrated", clip=0.02), Sparse(4))), 12.9, 14.5),
    "scaled channels": (ChannelScaled(Affine(4, 0, zero=True)), 21.2, 22.8),
    "turned": (Rotated(Nonuniform(3, kind="normal", zero=False)), 14.2, 15.8),
    "turned in two stages": (
        Rotated(Sum((Nonuniform(2, kind="normal", zero=False), Sign())), "orthogonal", 5), 12.9, 14.5),
    "a Hadamard matrix": (Rotated(Affine(4, 0), "hadamard"), 19.2, 20.8),
}  # fmt: skip


def samples(*lead: int, rows: int = 128, columns: int = 64, seed: int = 0) -> torch.Tensor:
    """Gaussian rows with a wide channel and one that is off centre, as keys have them."""
    x = torch.randn(*lead, rows, columns, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 6
    x[..., 9] += 4
    return x


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))
