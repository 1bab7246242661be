"""One label map: whether it can be decoded as in training, and whether its values are classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vheat_mm.datasets.checks.images import Fault, ImageFacts, Loader, examine_file
from vheat_mm.utils.text import some_of

IGNORED = 255


class MapRule(NamedTuple):
    """How a data set turns the values of a label map into classes.

    Attributes:
        num_classes: Values 0 .. num_classes - 1 are classes, after ``reduce_zero_label`` and ``label_map``; ``None``
            where any value is allowed.
        reduce_zero_label: 0 is ignored, and all others are reduced by one.
        label_map: (value, new value) for a subset of a data set's classes.
        loader: How the pipeline decodes it.
    """

    num_classes: int | None
    reduce_zero_label: bool
    label_map: tuple[tuple[int, int], ...]
    loader: Loader


class MapJob(NamedTuple):
    """A label map to examine."""

    path: str
    rule: MapRule


def examine_map(job: MapJob) -> ImageFacts:
    """Read and decode a label map, and count its values."""
    # What is unusual in an image, such as a palette, is usual in a label map.
    return examine_file(job.path, job.rule.loader, lambda labels, _: judge_labels(labels, job.rule))


def judge_labels(labels: np.ndarray, rule: MapRule) -> list[Fault]:
    """Faults of a decoded map of shape (height, width) or (height, width, channels)."""
    if rule.num_classes is None:  # panoptic: colours stand for segments
        return []
    if labels.ndim == 3 and labels.shape[2] > 1:
        return [('map-channels', f'{labels.shape[2]} channels')]
    if min(labels.shape[:2]) == 1:
        return [('map-one-pixel-wide', f'{labels.shape[1]} x {labels.shape[0]}')]
    low, high = labels.min(), labels.max()
    if low < 0 or high > IGNORED or np.issubdtype(labels.dtype, np.floating):
        return [('map-16-bit', f'values {low} .. {high} of type {labels.dtype}')]
    counts = np.bincount(labels.astype(np.uint8, copy=False).ravel(), minlength=256)
    learned = {int(value): learned_class(int(value), rule) for value in counts.nonzero()[0]}
    wrong = [value for value, new in learned.items() if new != IGNORED and not 0 <= new < rule.num_classes]
    if wrong:
        first = 1 if rule.reduce_zero_label else 0
        pixels = int(sum(counts[value] for value in wrong))
        allowed = f'{first} .. {rule.num_classes - 1 + first}' if not rule.label_map else 'the mapped classes'
        return [('map-values', f'{some_of(wrong)} on {pixels} pixels, outside {allowed}')]
    if all(new == IGNORED for new in learned.values()):
        return [('map-all-ignored', f'values {sorted(learned)}')]
    return []


def learned_class(value: int, rule: MapRule) -> int:
    """The class of a value in mmseg, 255 for ignored ones."""
    if rule.reduce_zero_label:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return dict(rule.label_map).get(value, value)
