"""Merging the queries of mask transformers (MaskFormer, Mask2Former) over views of one image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.models.tta.views import flip_maps

SAME = 0.5  # masks that overlap by more (soft IoU) show the same object


class QueryMerger:
    """Running mean over views of what each query says: class and mask probabilities.

    The queries of a view are matched one-to-one with those gathered so far, to the largest sum of overlaps. A pair
    of the same object is averaged; of any other pair, the query surer of showing an object is kept. Memory: a few
    masks a query and image, of the image's size, however many views.
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
        """What the fusion head makes of the merged queries, by image."""
        results = []
        for sample, (classes, masks, _) in zip(samples, self._merged, strict=True):
            height, width = masks.shape[-2:]
            sample.set_metainfo(dict(img_shape=(height, width), batch_input_shape=(height, width)))
            results += self.fusion_head.predict(
                classes.clamp_min(1e-12).log()[None], torch.logit(masks, eps=1e-6)[None], [sample], rescale=False
            )
        return results


def _merge(merged: tuple[Tensor, Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge one more view into the mean of those before."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    classes, masks, views = merged
    overlap = _soft_iou(masks, found[1])
    agreement = overlap + classes.sqrt() @ found[0].sqrt().T  # masks first; classes where masks say little
    _, match = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
    match = torch.as_tensor(match, device=masks.device)
    new_classes, new_masks = found[0][match], found[1][match]
    same = overlap.gather(1, match[:, None])[:, 0] > SAME
    surer = ~same & (new_classes[:, -1] < classes[:, -1])  # the last class is "no object"
    # weight of the new query in the mean: 1 / n of the same object, else all or nothing
    weight = torch.where(same, 1 / (views + 1), surer.to(views.dtype))
    views = torch.where(same, views + 1, torch.where(surer, torch.ones_like(views), views))
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
