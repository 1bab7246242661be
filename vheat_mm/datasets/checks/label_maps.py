"""Label maps: whether each can be decoded as in training, and whether its values, or those of all, are classes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from vheat_mm.datasets.checks.images import Fault, ImageFacts, Loader, examine_file
from vheat_mm.utils.text import some_of

IGNORED = 255  # what mmseg makes of 0 with reduce_zero_label, and of classes that are not chosen
_READ_AT_START, _FAULTY_AT_START = 500, 20
_TOO_FEW = ('maps-without-classes', 'maps-of-one-class')


class MapRule(NamedTuple):
    """How a data set turns the values of a label map into classes.

    Attributes:
        num_classes: Values 0 .. num_classes - 1 are classes, after ``reduce_zero_label`` and ``label_map``; ``None``
            where any value is allowed.
        reduce_zero_label: 0 is ignored, and all others are reduced by one.
        label_map: (value, new value) for a subset of a data set's classes.
        loader: How the pipeline decodes it.
        ignored: (who, value that is ignored there): the data set, then the heads and evaluators.
    """

    num_classes: int | None
    reduce_zero_label: bool
    label_map: tuple[tuple[int, int], ...]
    loader: Loader
    ignored: tuple[tuple[str, int | None], ...] = (('the data set', IGNORED),)


class MapJob(NamedTuple):
    """A label map to examine."""

    path: str
    rule: MapRule


def examine_map(job: MapJob) -> ImageFacts:
    """Read and decode a label map, and count its values."""
    found: list[int] = []

    def judge(labels: np.ndarray, _: list[Fault]) -> list[Fault]:
        # What is unusual in an image, such as a palette, is usual in a label map.
        faults = judge_labels(labels, job.rule)
        if job.path.lower().endswith(('.jpg', '.jpeg')):
            faults.append(('map-lossy', ''))
        if job.rule.num_classes is not None and {kind for kind, _ in faults} <= {'map-all-ignored', 'map-lossy'}:
            found.extend(np.unique(labels).tolist())
        return faults

    return examine_file(job.path, job.rule.loader, judge)._replace(values=tuple(found))


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
    ignored = {value for _, value in rule.ignored}
    wrong = [value for value, new in learned.items() if new not in ignored and not 0 <= new < rule.num_classes]
    if wrong:
        first = 1 if rule.reduce_zero_label else 0
        pixels = int(sum(counts[value] for value in wrong))
        allowed = f'{first} .. {rule.num_classes - 1 + first}' if not rule.label_map else 'the mapped classes'
        return [('map-values', f'{some_of(wrong)} on {pixels} pixels, outside {allowed}')]
    if all(new in ignored for new in learned.values()):
        return [('map-all-ignored', f'values {sorted(learned)}')]
    return []


def judge_together(values: set[int], count: int, rule: MapRule, trains: bool, complete: bool = True) -> Iterator[Fault]:
    """Faults of all label maps of a data set.

    Args:
        values: Those that occur in any of them.
        count: Number of maps.
        rule: How they become classes.
        trains: Whether training uses them: those to test on, which may be few, may well hold the background alone.
        complete: Whether all its maps have been read.
    """
    if rule.num_classes is None:
        return
    new = {learned_class(value, rule): value for value in sorted(values)}
    for label, value in new.items():
        believers = [who for who, ignored in rule.ignored if ignored == label]
        others = [f'{who} (ignore_index={ignored})' for who, ignored in rule.ignored if ignored != label]
        if believers and others and not 0 <= label < rule.num_classes:
            is_harmless = len(others) == 1 and others[0].startswith('the data set')
            named = f'value {value}' + (f', turned into {label},' if label != value else '')
            text = f'{named} is ignored by {", ".join(believers)}, not by {", ".join(others)}'
            yield 'ignore-index-unsaid' if is_harmless else 'ignore-index-differs', text
    classes = [label for label in new if label not in {ignored for _, ignored in rule.ignored}]
    if complete and len(classes) < 2 <= rule.num_classes:
        only = f'only class {classes[0]}' if classes else 'no class'
        left = ' and ignored pixels' if len(classes) < len(new) else ''
        kind = 'maps-without-classes' if trains or left else 'maps-of-one-class'
        yield kind, f'{count} maps hold the values {some_of(sorted(values))}: {only}{left}'


def judge_first(jobs: Iterator[MapJob], trains: bool) -> Iterator[tuple[str | None, Fault]]:
    """As :func:`judge_together`, at the start of a training: maps are read until there are two classes.

    That takes one or two maps of a healthy data set. Training leaves faulty maps out; they are the cause where no
    other is usable, or where all others hold less than two classes.

    Yields:
        Path of a map, ``None`` for all together; its fault.
    """
    values: set[int] = set()
    faults: list[tuple[str | None, Fault]] = []
    together: list[Fault] = []
    usable = 0
    for job in islice(jobs, _READ_AT_START):
        facts = examine_map(job)
        if facts.values:
            usable += 1
            values.update(facts.values)
            together = list(judge_together(values, usable, job.rule, trains))
            if not any(kind in _TOO_FEW for kind, _ in together):
                break
        else:
            faults += [(job.path, fault) for fault in facts.faults]
            if not usable and len(faults) >= _FAULTY_AT_START:
                break
    else:
        complete = next(jobs, None) is None
        if faults or not complete:
            together = [fault for fault in together if fault[0] not in _TOO_FEW]
        usable = usable * (not complete)
    if not usable:
        yield from faults
    yield from ((None, fault) for fault in together)


def learned_class(value: int, rule: MapRule) -> int:
    """The class of a value in mmseg; what is ignored keeps its value, or is 255."""
    if rule.reduce_zero_label:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return dict(rule.label_map).get(value, value)
