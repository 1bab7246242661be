"""One label map: decoded as training decodes it, its values within the classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vheat_mm.datasets.checks.images import FaultError, ImageFacts, Loader, decode, read_file

IGNORED = 255


class MapRule(NamedTuple):
    """What becomes of a map's values.

    Attributes:
        num_classes: Values 0 .. num_classes - 1 are classes, once shifted and mapped; ``None`` where any value goes.
        reduce_zero_label: 0 is ignored and all others go down by one.
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
    try:
        content = read_file(job.path, job.rule.loader.backend_args)
        labels, _ = decode(content, job.rule.loader)  # palettes and the like are as they should be here
    except FaultError as error:
        return ImageFacts(faults=((error.args[0], error.args[1]),))
    height, width = labels.shape[:2]
    if job.rule.num_classes is None:  # of panoptic sets: colours stand for segments
        return ImageFacts((), (width, height))
    return ImageFacts(tuple(judge_labels(labels, job.rule)), (width, height))


def judge_labels(labels: np.ndarray, rule: MapRule) -> list[tuple[str, str]]:
    """Faults of a decoded map of shape (height, width) or with channels behind."""
    if labels.ndim == 3 and labels.shape[2] > 1:
        return [('map-channels', f'{labels.shape[2]} channels')]
    if min(labels.shape[:2]) == 1:
        return [('map-line', f'{labels.shape[1]} x {labels.shape[0]}')]
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if labels.dtype != np.uint8:
        low, high = labels.min(), labels.max()
        if low < 0 or high > IGNORED or not np.issubdtype(labels.dtype, np.integer):
            return [('map-16-bit', f'values {low} .. {high} of type {labels.dtype}')]
        labels = labels.astype(np.uint8)
    counts = np.bincount(labels.ravel(), minlength=256)
    assert rule.num_classes is not None
    learned = {int(value): learned_class(int(value), rule) for value in counts.nonzero()[0]}
    wrong = [value for value, new in learned.items() if new != IGNORED and not 0 <= new < rule.num_classes]
    if wrong:
        first = 1 if rule.reduce_zero_label else 0
        pixels = int(sum(counts[value] for value in wrong))
        shown = ', '.join(map(str, wrong[:8])) + (' ...' if len(wrong) > 8 else '')
        allowed = f'{first} .. {rule.num_classes - 1 + first}' if not rule.label_map else 'the mapped classes'
        return [('map-values', f'{shown} on {pixels} pixels, outside {allowed}')]
    if all(new == IGNORED for new in learned.values()):
        return [('map-unlabelled', f'values {sorted(learned)}')]
    return []


def learned_class(value: int, rule: MapRule) -> int:
    """The class that mmseg makes of a value, 255 for ignored ones."""
    if rule.reduce_zero_label:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return dict(rule.label_map).get(value, value)
