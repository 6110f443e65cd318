"""ONNX ops that read images between their pixels: Resize, Upsample, GridSample, AffineGrid, RoiAlign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from ....errors import SmeltError
from ..registry import Ints, Tensor, op

Weights = dict[int, float]  # of the places that a point is read from


def _nearest(mode: str) -> Callable[[float], int]:
    rules: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda x: math.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: math.floor(x + 0.5),
        "floor": math.floor,
        "ceil": math.ceil,
    }
    if mode not in rules:
        raise SmeltError(f"Resize: no nearest_mode {mode!r}; there are {sorted(rules)}")
    return rules[mode]


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(a: float) -> Callable[[float], float]:
    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return ((a + 2) * x - (a + 3)) * x * x + 1
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0

    return kernel


def _taps(at: float, kernel: Callable[[float], float], reach: int, scale: float) -> Weights:
    """Weights around a point; with a scale below one the kernel is stretched, which antialiases."""
    wide = math.ceil(reach / scale)
    low = math.floor(at) - wide
    found = {i: kernel((i - at) * scale) for i in range(low, low + 2 * wide + 2)}
    total = sum(found.values())
    return {i: w / total for i, w in found.items() if w}


def _origin(i: int, size: int, length: float, count: int, scale: float, roi: tuple[float, float], mode: str) -> float:
    """Where the i-th of `count` outputs stands among `size` inputs; `length` is the output's exact length."""
    if mode == "align_corners":
        return i * (size - 1) / (length - 1) if length != 1 else 0.0
    if mode == "asymmetric":
        return i / scale
    if mode == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if length != 1 else -0.5
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - count / length) + (i + 0.5) / scale - 0.5
    if mode == "tf_crop_and_resize":
        start, end = roi
        if length == 1:
            return (start + end) * (size - 1) / 2
        return start * (size - 1) + i * (end - start) * (size - 1) / (length - 1)
    raise SmeltError(f"Resize: no coordinate_transformation_mode {mode!r}")


def _sizes(
    x: Tensor, scales: Sequence[float], sizes: Sequence[int], dims: list[int], policy: str
) -> tuple[list[float], list[int]]:
    if scales:
        return list(scales), [math.floor(x.shape[d] * s) for d, s in zip(dims, scales, strict=True)]
    ratios = [n / x.shape[d] for d, n in zip(dims, sizes, strict=True)]
    if policy == "stretch":
        return ratios, list(sizes)
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [ratio] * len(dims), [math.floor(ratio * x.shape[d] + 0.5) for d in dims]


@op("Resize", since=11)
def resize(
    x: Tensor,
    roi: Ints | None = None,
    scales: Ints | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """x with other sizes: along each axis a product with a matrix of interpolation weights, known while tracing."""
    dims = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    factors, counts = _sizes(x, scales or (), sizes or (), dims, keep_aspect_ratio_policy)
    for k, (dim, scale, count) in enumerate(zip(dims, factors, counts, strict=True)):
        size = x.shape[dim]
        if not isinstance(size, int):
            if scale == 1.0:
                continue
            raise SmeltError("Resize along an axis whose size is not known while importing")
        span = (float(roi[k]), float(roi[k + len(dims)])) if roi else (0.0, 1.0)
        if scale == 1.0 and count == size and coordinate_transformation_mode != "tf_crop_and_resize":
            continue
        points = [
            _origin(i, size, scale * size, count, scale, span, coordinate_transformation_mode) for i in range(count)
        ]
        if mode == "nearest":
            pick = _nearest(nearest_mode)
            at = [min(max(pick(p), 0), size - 1) for p in points]
            out = x.index_select(dim, torch.tensor(at, dtype=torch.int64))
        else:
            kernel, reach = _kernel(mode, cubic_coeff_a)
            shrink = min(scale, 1.0) if antialias else 1.0
            rows = [_row(_taps(p, kernel, reach, shrink), size, bool(exclude_outside)) for p in points]
            out = _weighed(x, dim, torch.tensor(rows, dtype=torch.float64))
        if coordinate_transformation_mode == "tf_crop_and_resize":
            outside = torch.tensor([p < 0 or p > size - 1 for p in points])
            outside = outside.reshape(-1, *[1] * (x.dim() - dim - 1))
            out = torch.where(outside, torch.full_like(out, extrapolation_value), out)
        x = out
    return x


def _kernel(mode: str, a: float) -> tuple[Callable[[float], float], int]:
    if mode == "linear":
        return _triangle, 1
    if mode == "cubic":
        return _cubic(a), 2
    raise SmeltError(f"Resize: no mode {mode!r}; there are nearest, linear and cubic")


def _row(taps: Weights, size: int, exclude_outside: bool) -> list[float]:
    """Weights of all inputs; what lies outside is left out, or read from the edge."""
    if exclude_outside:
        taps = {i: w for i, w in taps.items() if 0 <= i < size}
        total = sum(taps.values())
        taps = {i: w / total for i, w in taps.items()}
    row = [0.0] * size
    for i, weight in taps.items():
        row[min(max(i, 0), size - 1)] += weight
    return row


def _weighed(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.matmul(x.movedim(dim, -1), matrix.to(x.dtype).t()).movedim(-1, dim)
    return torch.matmul(x.double().movedim(dim, -1), matrix.double().t()).movedim(-1, dim).to(x.dtype)


@op("Resize")
def resize_10(x: Tensor, scales: Ints, *, mode: str = "nearest") -> Tensor:
    """x times `scales`, from the pixel below or between pixels."""
    return upsample(x, scales, mode=mode)


@op("Upsample", since=9)
def upsample(x: Tensor, scales: Ints, *, mode: str = "nearest") -> Tensor:
    """x times `scales`, from the pixel below or between pixels."""
    return resize(x, None, scales, mode=mode, nearest_mode="floor", coordinate_transformation_mode="asymmetric")


@op("GridSample")
def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """x read at the points of `grid`, in [-1, 1] along each axis."""
    known = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    if mode not in known:
        raise SmeltError(f"GridSample: no mode {mode!r}; there are {sorted(known)}")
    return F.grid_sample(x, grid.to(x.dtype), known[mode], padding_mode, bool(align_corners))


@op("AffineGrid")
def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    """The points that an affine map `theta` sends each pixel to."""
    return F.affine_grid(theta, list(size), bool(align_corners))


@op("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Boxes [R, 4] of images x as grids of bins, each the mean or maximum of `sampling_ratio`² points."""
    if sampling_ratio <= 0:
        raise SmeltError("RoiAlign with sampling_ratio=0 takes as many points as a box is large; give it a number")
    half = coordinate_transformation_mode == "half_pixel"
    box = rois * spatial_scale - (0.5 if half else 0.0)
    extent = box[:, 2:] - box[:, :2]
    extent = extent if half else extent.clamp(min=1.0)
    h, w = x.shape[2:]
    ys = _bins(box[:, 1], extent[:, 1], output_height, sampling_ratio)
    xs = _bins(box[:, 0], extent[:, 0], output_width, sampling_ratio)
    image = x.index_select(0, batch_indices.to(torch.int64)).flatten(2)  # [R, C, h w]
    read = []
    for row, share_y in _edges(ys, h):
        for column, share_x in _edges(xs, w):
            at = (row[:, :, None] * w + column[:, None, :]).flatten(1)[:, None].expand(-1, image.shape[1], -1)
            share = (share_y[:, :, None] * share_x[:, None, :]).flatten(1)[:, None]
            read.append(torch.gather(image, 2, at) * share)
    inside = ((ys >= -1) & (ys <= h))[:, :, None] & ((xs >= -1) & (xs <= w))[:, None, :]
    # the maximum is over the weighed corners, as in the definition
    points = sum(read[1:], read[0]) if mode == "avg" else torch.stack(read).amax(0)
    points = torch.where(inside.flatten(1)[:, None], points, torch.zeros_like(points))
    bins = points.reshape(*points.shape[:2], output_height, sampling_ratio, output_width, sampling_ratio)
    if mode == "avg":
        return bins.mean((3, 5))
    if mode != "max":
        raise SmeltError(f"RoiAlign: no mode {mode!r}; there are avg and max")
    return bins.amax((3, 5))


def _bins(start: Tensor, extent: Tensor, count: int, points: int) -> Tensor:
    """[R, count * points]: the middles of the points of each bin."""
    return start[:, None] + (torch.arange(count * points) + 0.5) * (extent[:, None] / (count * points))


def _edges(at: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The pixels before and behind a point, and their shares."""
    at = at.clamp(min=0)
    low = at.floor().clamp(max=size - 1)
    share = torch.where(low >= size - 1, torch.zeros_like(at), at - low)
    return [(low.long(), 1 - share), ((low + 1).clamp(max=size - 1).long(), share)]
