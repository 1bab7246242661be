"""Test-time augmentation of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS


@MODELS.register_module()
class ClsTTAModel(BaseTTAModel):
    """Average the scores of an image's views and set the label from the average.

    mmpretrain's ``AverageClsScoreTTA`` keeps the label of the first view.
    """

    def merge_preds(self, data_samples_list: Sequence[Sequence[Any]]) -> list:
        """Merge predictions by image and view -> by image."""
        return [self._merge(samples) for samples in data_samples_list]

    def _merge(self, samples: Sequence[Any]) -> Any:
        merged = samples[0].new()
        score = sum(sample.pred_score for sample in samples) / len(samples)
        merged.set_pred_score(score)
        if not hasattr(getattr(self.module, 'head', None), 'thr'):  # multi-label heads set labels by a threshold
            merged.set_pred_label(score.argmax(0, keepdim=True))
        return merged
