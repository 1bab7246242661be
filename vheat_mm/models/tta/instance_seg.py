"""The model that ``tools/test.py --tta`` wraps around detectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from vheat_mm.models.tta.boxes import merge_boxes
from vheat_mm.models.tta.queries import QueryMerger
from vheat_mm.models.tta.views import check_views, flip_boxes, flip_maps, to_view

View = dict[str, list]
_SUPPORTED_HEADS = ('StandardRoIHead', 'CascadeRoIHead', 'PointRendRoIHead')


@MODELS.register_module()
class InstanceSegTTAModel(BaseTTAModel):
    """Predict from flipped and rescaled views of each image: boxes, and masks where the detector has them.

    - Boxes of all views are merged in image coordinates (:func:`.boxes.merge_boxes`).
    - RoI heads (Mask R-CNN, Cascade Mask R-CNN, PointRend) predict masks for the merged boxes in every view. The
      probabilities are flipped back and averaged per box, then pasted and thresholded once.
    - Queries of mask transformers (MaskFormer, Mask2Former: instance and panoptic) are matched between views, and
      their class and mask probabilities averaged (:class:`.queries.QueryMerger`).

    Views are processed one after another, twice by detectors with RoI masks: memory does not grow with their number.

    Args:
        module: The detector or its config.
        tta_cfg: As of mmdet's ``DetTTAModel``: ``nms=dict(iou_threshold=...)`` and ``max_per_img``; defaults are
            the detector's own values.
        data_preprocessor: Replaces the detector's if ``module`` is a config.

    Raises:
        TypeError: The detector predicts masks in another way; unknown options in ``tta_cfg``.
    """

    def __init__(self, module: dict | nn.Module, tta_cfg: Mapping | None = None, data_preprocessor: Any = None):
        super().__init__(module, data_preprocessor)
        own = getattr(self.module, 'test_cfg', None) or {}
        own = own.get('rcnn') or own
        given = dict(tta_cfg or {})
        nms = dict(given.pop('nms', None) or {})
        if nms.pop('type', 'nms') != 'nms' or set(nms) - {'iou_threshold'}:
            raise TypeError(
                f"tta_cfg.nms={(tta_cfg or {})['nms']!r}: boxes are merged by type='nms' and iou_threshold alone"
            )
        self.iou_threshold = nms.get('iou_threshold', (own.get('nms') or {}).get('iou_threshold', 0.5))
        self.max_per_img = given.pop('max_per_img', own.get('max_per_img', own.get('max_per_image', 100)))
        if given:
            raise TypeError(f'tta_cfg takes nms and max_per_img, got {sorted(given)} as well')
        self.merge = self._choose_merge()

    def _choose_merge(self):
        module = self.module
        if hasattr(module, 'panoptic_fusion_head'):
            if hasattr(module.panoptic_fusion_head, 'instance_postprocess'):
                return self._merge_queries
        elif not any(map(_predicts_masks, module.modules())):
            return self._merge_boxes
        elif getattr(module, 'with_rpn', False) and module.roi_head.with_mask and _has_supported_masks(module.roi_head):
            return self._merge_rois
        raise TypeError(
            f'test-time augmentation cannot merge the masks of {type(module).__name__}; it supports RoI heads '
            '(Mask R-CNN, Cascade Mask R-CNN, PointRend), MaskFormer and Mask2Former: drop --tta'
        )

    @torch.no_grad()
    def test_step(self, data: Mapping[str, list] | Sequence) -> list:
        """Predict from ``data['inputs']`` and ``data['data_samples']``, each by view and image.

        Returns:
            Samples of the first view with the merged prediction, in image coordinates.

        Raises:
            ViewError: A view does not say how it was scaled or flipped.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f'expected batches of pseudo_collate (a dict by view and image), got {type(data).__name__}')
        check_views(data['data_samples'])
        views = [dict(zip(data, parts, strict=True)) for parts in zip(*data.values(), strict=True)]
        return self.merge(views)

    def merge_preds(self, data_samples_list: Sequence[Sequence]) -> list:
        """Merge predictions of detectors without masks: by image and view -> by image."""
        for samples in data_samples_list:
            found = [_in_image(sample.pred_instances, sample.metainfo) for sample in samples]
            samples[0].pred_instances = merge_boxes(found, self.iou_threshold, self.max_per_img)
        return [samples[0] for samples in data_samples_list]

    def _merge_boxes(self, views: list[View]) -> list:
        return self.merge_preds(list(zip(*(self.module.test_step(view) for view in views), strict=True)))

    def _merge_queries(self, views: list[View]) -> list:
        merger = QueryMerger(self.module.panoptic_head, self.module.panoptic_fusion_head)
        samples: list = []
        for view in views:
            features, seen = self._features(view)
            merger.add(features, seen)
            samples = samples or seen
        return self.module.add_pred_to_datasample(samples, merger.results(samples))

    def _merge_rois(self, views: list[View]) -> list:
        roi_head = self.module.roi_head
        samples: list = []
        found: list[list[InstanceData]] = []
        for view in views:
            features, seen = self._features(view)
            if 'proposals' in seen[0]:
                proposals = [sample.proposals for sample in seen]
            else:
                proposals = self.module.rpn_head.predict(features, seen, rescale=False)
            metas = [sample.metainfo for sample in seen]
            boxes = roi_head.predict_bbox(features, metas, proposals, rcnn_test_cfg=roi_head.test_cfg, rescale=True)
            found.append([_in_image(result, meta) for result, meta in zip(boxes, metas, strict=True)])
            samples = samples or seen
        merged = [merge_boxes(of_image, self.iou_threshold, self.max_per_img) for of_image in zip(*found, strict=True)]
        totals: list[Tensor] = []
        for view in views:
            of_view = self._roi_masks(view, merged)
            totals = [a + b for a, b in zip(totals, of_view, strict=True)] if totals else of_view
        for sample, result, total in zip(samples, merged, totals, strict=True):
            sample.pred_instances = self._paste(result, total / len(views), sample.metainfo)
        return samples

    def _features(self, view: View) -> tuple[Any, list]:
        data = self.module.data_preprocessor(view, False)
        return self.module.extract_feat(data['inputs']), data['data_samples']

    def _roi_masks(self, view: View, merged: list[InstanceData]) -> list[Tensor]:
        """Probabilities (n, h, w) of the merged boxes' masks in their boxes, as this view shows them, by image."""
        probabilities = [result.scores.new_zeros(0, 1, 1) for result in merged]
        if not any(map(len, merged)):
            return probabilities
        features, samples = self._features(view)
        for i, (result, sample) in enumerate(zip(merged, samples, strict=True)):
            if len(result):  # PointRend takes no image without boxes
                probabilities[i] = self._masks_of(
                    tuple(level[i : i + 1] for level in features), result, sample.metainfo
                )
        return probabilities

    def _masks_of(self, features: tuple[Tensor, ...], result: InstanceData, meta: Mapping) -> Tensor:
        roi_head = self.module.roi_head
        placed = InstanceData(bboxes=to_view(result.bboxes, meta), labels=result.labels, scores=result.scores)
        with _recorded(_mask_head(roi_head)) as calls:
            # Cascades would flip masks themselves, with negative strides, which PyTorch does not support.
            roi_head.predict_mask(features, [dict(meta, flip=False)], [placed])
        [([mask], activated)] = calls
        channel = result.labels if mask.shape[1] > 1 else torch.zeros_like(result.labels)
        mask = mask[torch.arange(len(result), device=channel.device), channel]
        return flip_maps(mask if activated else mask.sigmoid(), meta)

    def _paste(self, result: InstanceData, probabilities: Tensor, meta: Mapping) -> InstanceData:
        """Masks of the image's size from probabilities (n, h, w) in the boxes."""
        head = _mask_head(self.module.roi_head)
        classes = 1 if head.class_agnostic else head.num_classes
        [result] = head.predict_by_feat(
            mask_preds=[torch.logit(probabilities, eps=1e-6)[:, None].expand(-1, classes, -1, -1)],
            results_list=[result],
            batch_img_metas=[dict(meta, scale_factor=(1.0, 1.0))],
            rcnn_test_cfg=self.module.roi_head.test_cfg,
            rescale=False,
        )
        return result


def _predicts_masks(module: nn.Module) -> bool:
    """Whether a part of a detector predicts masks; RTMDet-Ins does so in its box head."""
    in_box_head = any(kind.__name__.startswith('RTMDetIns') for kind in type(module).__mro__)
    return in_box_head or getattr(module, 'mask_head', None) is not None


def _has_supported_masks(roi_head: Any) -> bool:
    """Whether masks depend on features and boxes only, and scores do not depend on masks.

    HTC and SCNet (semantic features) and Mask Scoring R-CNN override these methods.
    """
    methods = (type(roi_head).predict_bbox, type(roi_head).predict_mask)
    return all(method.__qualname__.split('.')[0] in _SUPPORTED_HEADS for method in methods)


def _mask_head(roi_head: Any) -> Any:
    head = getattr(roi_head, 'mask_head', None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def _in_image(result: InstanceData, meta: Mapping) -> InstanceData:
    """Boxes of a view, which the detector has rescaled, in pixels of the image; without masks."""
    return InstanceData(bboxes=flip_boxes(result.bboxes, meta), scores=result.scores, labels=result.labels)


@contextmanager
def _recorded(head: nn.Module) -> Iterator[list[tuple[Sequence[Tensor], bool]]]:
    """Record the arguments of ``predict_by_feat`` instead of pasting: maps by image, and whether they are sigmoids."""
    calls: list[tuple[Sequence[Tensor], bool]] = []

    def record(mask_preds, results_list, *args, activate_map=False, **kwargs):
        calls.append((mask_preds, activate_map))
        return results_list

    head.predict_by_feat = record  # type: ignore[assignment]
    try:
        yield calls
    finally:
        del head.predict_by_feat
