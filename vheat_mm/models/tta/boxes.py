"""Merging the boxes of several views of one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor


def merge_boxes(views: Sequence[InstanceData], iou_threshold: float, max_per_img: int) -> InstanceData:
    """Keep the best-scored box of each object.

    Greedy non-maximum suppression in which boxes of the same view do not suppress each other, because the detector
    has done that already. Identical views therefore give the result of one view.

    Args:
        views: Per view ``bboxes`` (n, 4) in pixels of the image, ``scores`` (n,), ``labels`` (n,).
        iou_threshold: A box is removed if a box of its class from another view has a higher score and a larger IoU.
        max_per_img: Maximum number of boxes.

    Returns:
        ``bboxes``, ``scores``, ``labels``, highest score first.
    """
    from mmdet.structures.bbox import bbox_overlaps

    boxes = torch.cat([view.bboxes for view in views])
    scores = torch.cat([view.scores for view in views])
    labels = torch.cat([view.labels for view in views])
    origin = torch.cat([torch.full_like(view.labels, i) for i, view in enumerate(views)])
    order = scores.sort(descending=True, stable=True).indices
    boxes, scores, labels, origin = (t[order] for t in (boxes, scores, labels, origin))
    rivals = (labels[:, None] == labels) & (origin[:, None] != origin)
    if len(boxes):
        rivals &= bbox_overlaps(boxes.float(), boxes.float()) > iou_threshold
    kept = _greedy(rivals.cpu(), max_per_img).to(boxes.device)
    return InstanceData(bboxes=boxes[kept], scores=scores[kept], labels=labels[kept])


def _greedy(rivals: Tensor, limit: int) -> Tensor:
    """Indices to keep, best first: (n, n) symmetric mask, rows in order of score -> (k,)."""
    alive = torch.ones(len(rivals), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(rivals)):
        if alive[i]:
            kept.append(i)
            if len(kept) == limit:
                break
            alive &= ~rivals[i]
    return torch.tensor(kept, dtype=torch.long)
