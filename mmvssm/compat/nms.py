"""Greedy non-maximum suppression in plain torch, with the signature and results of ``mmcv._ext.nms``."""

from __future__ import annotations

import torch
from torch import Tensor

# Boxes decided together. Larger blocks mean fewer steps and larger IoU matrices; 512 is fast on CPU and GPU.
_BLOCK = 512
# Columns of the IoU matrix (times _BLOCK rows) that are laid out at once: few on CPU, where the steps then stay in its
# cache, many on GPU, where every step is a launch.
_COLUMNS = {"cpu": 512, "cuda": 16384}


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, best score first.

    The best boxes left are decided in blocks; what a decided block keeps then strikes out worse boxes. Inside a block,
    "kept unless a kept better box overlaps" is iterated to its fixed point, which is the greedy result, because whether
    a box is kept depends on better boxes only.

    Args:
        boxes (Tensor): (n, 4) corners x1, y1, x2, y2, any floating dtype; computed in float32 (float64 stays).
        scores (Tensor): (n,).
        iou_threshold (float): Boxes that overlap a kept one by more than this are dropped.
        offset (int): 0 or 1, added to widths and heights.

    Returns:
        Tensor: int64 indices into ``boxes``, on its device.
    """
    left = torch.sort(scores, descending=True, stable=True).indices
    corners = boxes if boxes.dtype == torch.float64 else boxes.float()
    # One row per coordinate, then the area.
    geometry = torch.cat([corners.T, (corners[:, 2:] - corners[:, :2] + offset).prod(1)[None]])

    columns = _COLUMNS.get(boxes.device.type, 16384)
    kept = [left[:0]]
    while len(left):
        block, left = left[:_BLOCK], left[_BLOCK:]
        hits = _overlaps(geometry[:, block], geometry[:, block], iou_threshold, offset).triu(1)  # [i, j]: i is better
        keep = torch.ones(len(block), dtype=torch.bool, device=boxes.device)
        while True:
            new = ~(hits & keep[:, None]).any(0)
            if torch.equal(new, keep):
                break
            keep = new
        block = block[keep]
        kept.append(block)
        better = geometry[:, block]
        left = torch.cat(
            [part[~_overlaps(better, geometry[:, part], iou_threshold, offset).any(0)] for part in left.split(columns)]
        )
    return torch.cat(kept)


def _overlaps(a: Tensor, b: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Whether boxes a (5, n) and b (5, m) overlap by more than the threshold: (n, m); False where both areas are 0."""
    left, top, right, bottom, area_a = a.unsqueeze(2)
    width = (torch.minimum(right, b[2]) - torch.maximum(left, b[0])).add_(offset).clamp_(min=0)
    inner = (torch.minimum(bottom, b[3]) - torch.maximum(top, b[1])).add_(offset).clamp_(min=0).mul_(width)
    union = (area_a + b[4]).sub_(inner)
    return inner.div_(union) > iou_threshold  # 0 / 0 is NaN, and NaN > t is False
