"""NonMaxSuppression: which boxes stay when those that overlap a better one go; unrolled over the boxes."""

from __future__ import annotations

import torch

from ....errors import SmeltError
from ..registry import Number, Operand, Tensor, op

_MOST = 512  # boxes: each is one step of the graph


@op("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Number = 0,
    iou_threshold: Operand | None = None,
    score_threshold: Operand | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Rows (batch, class, box) of the boxes [B, N, 4] kept for each class of `scores` [B, C, N], best first."""
    count = boxes.shape[1]
    if not isinstance(count, int) or count > _MOST:
        raise SmeltError(f"NonMaxSuppression over {count} boxes: it is unrolled, at most {_MOST} at a fixed size")
    most = int(max_output_boxes_per_class)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices  # [B, C, N]
    b, c, n = order.shape
    corners = _corners(boxes.float(), bool(center_point_box))[:, None].expand(b, c, n, 4)
    ranked = torch.gather(corners, 2, order[..., None].expand(b, c, n, 4))
    overlap = _overlap(ranked) > (0.0 if iou_threshold is None else iou_threshold)
    good = torch.gather(scores, 2, order)
    keep = torch.ones_like(good, dtype=torch.bool) if score_threshold is None else good > score_threshold
    for i in range(n - 1):  # a box that stays removes the worse ones that overlap it
        later = torch.arange(n) > i
        keep = keep & ~(keep[..., i : i + 1] & overlap[..., i, :] & later)
    keep = keep & (keep.cumsum(-1) <= most)
    batch, kind, rank = torch.nonzero(keep).unbind(1)
    return torch.stack([batch, kind, order[batch, kind, rank]], 1)


def _corners(boxes: Tensor, center: bool) -> Tensor:
    """Low and high y and x, whichever way the boxes were given."""
    a, b = boxes[..., :2], boxes[..., 2:]
    if center:
        return torch.cat([a - b / 2, a + b / 2], -1)
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)


def _overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs."""
    low = torch.maximum(boxes[..., :, None, :2], boxes[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], boxes[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    union = area[..., :, None] + area[..., None, :] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))
