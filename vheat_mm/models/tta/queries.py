"""Merging the queries of mask transformers (MaskFormer, Mask2Former) over views of one image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.models.tta.views import flip_maps

SAME_OBJECT_IOU = 0.5  # masks with a larger soft IoU show the same object


class QueryMerger:
    """Running mean over views of the class and mask probabilities of each query.

    The queries of a view are matched one-to-one with the merged ones so that the sum of overlaps is largest. Pairs of
    the same object are averaged; of other pairs, the query with the lower "no object" probability is kept. Memory: a
    few masks of the image's size per query and image, for any number of views.
    """

    def __init__(self, panoptic_head: Any, fusion_head: Any):
        self.panoptic_head = panoptic_head
        self.fusion_head = fusion_head
        self._merged: list[tuple[Tensor, Tensor, Tensor]] = []  # by image: class (Q, K + 1), mask (Q, H, W), views (Q,)

    def add(self, features: Any, samples: list) -> None:
        """Predict from the features of one view and merge."""
        logits, masks = self.panoptic_head.predict(features, samples)
        for i, sample in enumerate(samples):
            meta = sample.metainfo
            height, width = meta['img_shape'][:2]
            mask = F.interpolate(
                masks[i][:, None, :height, :width], size=tuple(meta['ori_shape'][:2]), mode='bilinear'
            )[:, 0]
            found = (logits[i].softmax(-1), flip_maps(mask, meta).sigmoid())
            if i == len(self._merged):
                self._merged.append((*found, torch.ones_like(found[0][:, 0])))
            else:
                self._merged[i] = _merge(self._merged[i], found)

    def results(self, samples: list) -> list[dict]:
        """Predictions of the fusion head from the merged queries, by image."""
        results = []
        for sample, (classes, masks, _) in zip(samples, self._merged, strict=True):
            height, width = masks.shape[-2:]
            sample.set_metainfo(dict(img_shape=(height, width), batch_input_shape=(height, width)))
            results += self.fusion_head.predict(
                classes.clamp_min(1e-12).log()[None], torch.logit(masks, eps=1e-6)[None], [sample], rescale=False
            )
        return results


def _merge(merged: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge one more view into the mean of the earlier ones."""
    from scipy.optimize import linear_sum_assignment

    classes, masks, views = merged
    overlap = _soft_iou(masks, found[1])
    agreement = overlap + classes.sqrt() @ found[0].sqrt().T  # classes decide where masks hardly overlap
    _, match = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
    match = torch.as_tensor(match, device=masks.device)
    new_classes, new_masks = found[0][match], found[1][match]
    same = overlap.gather(1, match[:, None])[:, 0] > SAME_OBJECT_IOU
    more_certain = ~same & (new_classes[:, -1] < classes[:, -1])  # the last class is "no object"
    # weight of the new query: 1 / n in a mean over n views of the same object, else 0 or 1
    weight = torch.where(same, 1 / (views + 1), more_certain.to(views.dtype))
    views = torch.where(same, views + 1, torch.where(more_certain, torch.ones_like(views), views))
    return (
        torch.lerp(classes, new_classes, weight[:, None]),
        torch.lerp(masks, new_masks, weight[:, None, None]),
        views,
    )


def _soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of soft masks, (Q, H, W) x (P, H, W) -> (Q, P), intersection by product."""
    first, second = first.flatten(1), second.flatten(1)
    intersection = first @ second.T
    sums = first.square().sum(1)[:, None] + second.square().sum(1)
    return intersection / (sums - intersection).clamp_min(1e-6)
