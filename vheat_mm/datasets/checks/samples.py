"""The samples of a data set: which files they name, and whether their labels can be learned."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vheat_mm.datasets.checks.coco import judge_coco, read_coco
from vheat_mm.datasets.checks.datasets import Part
from vheat_mm.datasets.checks.json_stream import MalformedJsonError
from vheat_mm.datasets.checks.label_maps import MapRule
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.utils.errors import describe

Note = Callable[[Finding], None]


class Sample(NamedTuple):
    """One sample's files.

    Attributes:
        image: Path.
        image_id: In a COCO file.
        size: (width, height) that the data set states.
        label: Of the whole image.
        label_map: Path, with what becomes of its values.
    """

    image: str
    image_id: Any = None
    size: tuple[float, float] | None = None
    label: Any = None
    label_map: tuple[str, MapRule] | None = None


def list_samples(part: Part, note: Note) -> Iterator[Sample]:
    """List a data set's samples; what its annotation files show on the way goes to ``note``."""
    methods = [getattr(type(part.dataset), name, None) for name in ('load_data_list', 'parse_data_info')]
    names = [getattr(method, '__qualname__', '') for method in methods]
    # By name: none of the task libraries need be installed here. Subclasses with other formats are read by themselves.
    if names == ['CocoDataset.load_data_list', 'CocoDataset.parse_data_info'] and _is_local(part.dataset.ann_file):
        yield from _list_coco(part, note)
    elif names[0] == 'CustomDataset.load_data_list' and part.dataset.ann_file:
        yield from _list_lines(part, note)
    else:
        yield from _list_loaded(part, note)


def _list_coco(part: Part, note: Note) -> Iterator[Sample]:
    path = part.dataset.ann_file
    if not _exists(path, note):
        return
    try:
        content = read_coco(path)
    except (MalformedJsonError, OSError) as error:
        kind = 'file-unreadable' if isinstance(error, OSError) else 'json-malformed'
        note(Finding(kind, path, str(error)))
        return
    for finding in judge_coco(content, part.classes, part.trains, part.with_mask):
        note(finding)
    folder = part.dataset.data_prefix.get('img', '')
    for image in content.images.values():
        yield Sample(os.path.join(folder, image.file_name), image.id, (image.width, image.height))  # noqa: PTH118


def _list_lines(part: Part, note: Note) -> Iterator[Sample]:
    """mmpretrain's lists: a path, a blank and a label in each line."""
    from mmengine.fileio import get_file_backend, list_from_file

    dataset, path = part.dataset, part.dataset.ann_file
    if not _exists(path, note):
        return
    backend = get_file_backend(dataset.img_prefix, enable_singleton=True)
    count = 0
    seen = _Labels(part, note)
    for number, line in enumerate(list_from_file(path), start=1):
        name, *label = line.strip().rsplit(' ', 1) if dataset.with_label else [line]
        if not name or (dataset.with_label and not (label and label[0].lstrip('+-').isdecimal())):
            note(Finding('label-malformed', path, f'line {number}: {line!r}'))
            continue
        image = backend.join_path(dataset.img_prefix, name)
        number_or_none = int(label[0]) if dataset.with_label else None
        seen.add(number_or_none, path, f'line {number}: {name}')
        count += 1
        yield Sample(image, label=number_or_none)
    seen.finish(path)
    if not count:
        note(Finding('data-set-empty', path, 'no line of it names a sample'))


def _list_loaded(part: Part, note: Note) -> Iterator[Sample]:
    """Any other data set, loaded by itself."""
    dataset = part.dataset
    place = str(getattr(dataset, 'ann_file', '') or getattr(dataset, 'data_root', '') or part.place)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if hasattr(dataset, 'full_init'):
                dataset.full_init()
            length = len(dataset)
    except Exception as error:  # whatever a reader raises on content it cannot take
        text = f'{type(dataset).__name__}: {describe(error)}'
        note(Finding('data-set-empty' if 'is empty' in text else 'data-set-unreadable', place, text))
        return
    part.__post_init__()  # its class names may have come with its files
    seen = _Labels(part, note)
    for index in range(length):
        try:
            info = dataset.get_data_info(index)
        except Exception as error:
            note(Finding('sample-unreadable', place, f'{type(dataset).__name__}, sample {index}: {describe(error)}'))
            continue
        image = info.get('img_path')
        if not isinstance(image, str):  # pixels held in memory, or several images
            continue
        seen.add(info.get('gt_label'), image, '')
        _judge_instances(info, part, image, note)
        label_map = info.get('seg_map_path')
        size = (info['width'], info['height']) if 'width' in info and 'height' in info else None
        label = info.get('gt_label')
        yield Sample(
            image,
            info.get('img_id'),
            size,
            label if isinstance(label, int) else None,
            (label_map, part.map_rule(info)) if label_map else None,
        )
    seen.finish(place)


class _Labels:
    """Labels of whole images, against the classes."""

    def __init__(self, part: Part, note: Note) -> None:
        self._part, self._note = part, note
        self._seen: set[int] = set()

    def add(self, label: Any, path: str, text: str) -> None:
        """Take a sample's label, labels or ``None`` in."""
        labels = label if isinstance(label, list | tuple) else [] if label is None else [label]
        self._seen.update(labels)
        limit = self._part.num_classes
        wrong = [value for value in labels if value < 0 or (limit is not None and value >= limit)]
        if wrong:
            text = f'label {", ".join(map(str, wrong))}' + (f', {text}' if text else '')
            self._note(Finding('label-out-of-range', path, f'{text}; classes are 0 .. {(limit or 0) - 1}'))

    def finish(self, path: str) -> None:
        """Look for classes that no sample has."""
        if self._seen and self._part.trains:
            for number, name in enumerate(self._part.classes):
                if number not in self._seen:
                    self._note(Finding('class-without-samples', path, f'{name} (label {number})'))


def _judge_instances(info: dict, part: Part, path: str, note: Note) -> None:
    """Boxes [left, top, right, bottom] of data sets that are not COCO's."""
    instances = info.get('instances') or []
    for number, instance in enumerate(instances):
        box, label = instance.get('bbox'), instance.get('bbox_label')
        text = f'instance {number}: {box}'
        if isinstance(label, int) and part.classes and not 0 <= label < len(part.classes):
            note(Finding('label-out-of-range', path, f'instance {number}: label {label}', info.get('img_id')))
        if not isinstance(box, list | tuple) or len(box) != 4:
            continue
        if not all(map(math.isfinite, box)):
            note(Finding('box-not-finite', path, text, info.get('img_id')))
        elif box[2] - box[0] < 0 or box[3] - box[1] < 0:
            note(Finding('box-negative', path, text, info.get('img_id')))
        elif box[2] - box[0] < 1 or box[3] - box[1] < 1:
            note(Finding('box-degenerate', path, text, info.get('img_id')))
    if part.trains and 'instances' in info and not instances:
        note(Finding('image-without-annotation', path, '', info.get('img_id')))


def _exists(path: str, note: Note) -> bool:
    from mmengine.fileio import exists

    if not exists(path):
        note(Finding('file-missing', path, 'the annotation file'))
        return False
    return True


def _is_local(path: str) -> bool:
    return '://' not in path
