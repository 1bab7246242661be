"""The samples of a data set: the files that they name, and whether their labels are classes."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mmengine.fileio import exists, get_file_backend, list_from_file

from vheat_mm.datasets.checks.coco import judge_coco, read_coco
from vheat_mm.datasets.checks.datasets import Part
from vheat_mm.datasets.checks.json_file import MalformedJsonError
from vheat_mm.datasets.checks.label_maps import MapRule
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.datasets.checks.voc import read_voc
from vheat_mm.utils.errors import describe
from vheat_mm.utils.text import some_of

Note = Callable[[Finding], None]


class Sample(NamedTuple):
    """One sample's files.

    Attributes:
        image: Path.
        image_id: In a COCO file.
        size: (width, height) that the data set states.
        label: Of the whole image.
        label_map: Path, and how its values become classes.
    """

    image: str
    image_id: Any = None
    size: tuple[float, float] | None = None
    label: Any = None
    label_map: tuple[str, MapRule] | None = None


def list_samples(part: Part, note: Note) -> Iterator[Sample]:
    """List a data set's samples; findings on its annotation files go to ``note``."""
    methods = [getattr(type(part.dataset), name, None) for name in ('load_data_list', 'parse_data_info')]
    names = [getattr(method, '__qualname__', '') for method in methods]
    # By name: no task library needs to be installed. Subclasses with other formats are read by their own methods.
    is_coco = names == ['CocoDataset.load_data_list', 'CocoDataset.parse_data_info']
    if is_coco and '://' not in part.dataset.ann_file:
        reader = _list_coco
    elif names[0] == 'CustomDataset.load_data_list' and part.dataset.ann_file:
        reader = _list_lines
    elif names[0] == 'XMLDataset.load_data_list':
        reader = _list_xml
    else:
        yield from _list_loaded(part, note)
        return
    path = part.dataset.ann_file
    if not exists(path):
        note(Finding('file-missing', path, 'the annotation file'))
        return
    empty = True
    try:
        for sample in reader(part, note):
            yield sample
            empty = False
    except OSError as error:
        note(Finding('file-unreadable', path, str(error.strerror or error)))
    except MalformedJsonError as error:
        note(Finding('json-malformed', path, str(error)))
    except UnicodeDecodeError as error:
        note(Finding('label-malformed', path, f'not UTF-8 ({error.reason} at byte {error.start})'))
    else:
        if empty:
            note(Finding('dataset-empty', path, 'it names no usable sample'))


def _list_coco(part: Part, note: Note) -> Iterator[Sample]:
    path = part.dataset.ann_file
    content = read_coco(path, part.with_mask)
    for finding in judge_coco(content, part.classes, part.trains, part.with_mask, bool(part.metrics)):
        note(finding)
    part.annotations = len(content.annotation_ids)
    for other in {name for _, name in part.metrics if os.path.realpath(name) != os.path.realpath(path)}:
        note(Finding('evaluator-file', path, f'the evaluator has ann_file={other!r} ({part.place})'))
    folder = part.dataset.data_prefix.get('img', '')
    for image in content.images.values():
        yield Sample(os.path.join(folder, image.file_name), image.id, (image.width, image.height))  # noqa: PTH118


def _list_xml(part: Part, note: Note) -> Iterator[Sample]:
    for info in read_voc(part, note):
        _judge_instances(info, part, info['img_path'], note)
        yield Sample(info['img_path'], info['img_id'], (info['width'], info['height']))


def _list_lines(part: Part, note: Note) -> Iterator[Sample]:
    """mmpretrain's lists: a path, a space and a label in each line."""
    dataset, path = part.dataset, part.dataset.ann_file
    backend = get_file_backend(dataset.img_prefix, enable_singleton=True)
    seen = _Labels(part, note)
    for number, line in enumerate(list_from_file(path), start=1):
        name, *label = line.strip().rsplit(' ', 1) if dataset.with_label else [line]
        if not name or (dataset.with_label and not (label and label[0].lstrip('+-').isdecimal())):
            note(Finding('label-malformed', path, f'line {number}: {line!r}'))
            continue
        label_or_none = int(label[0]) if dataset.with_label else None
        seen.add(label_or_none, name, path, f'line {number}: {name}')
        yield Sample(backend.join_path(dataset.img_prefix, name), label=label_or_none)
    seen.finish(path)


def _list_loaded(part: Part, note: Note) -> Iterator[Sample]:
    """Any other data set, read by its own methods."""
    dataset = part.dataset
    if not hasattr(dataset, 'get_data_info'):  # not a data set of OpenMMLab: only its samples can be loaded
        return
    place = part.source
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if hasattr(dataset, 'full_init'):
                dataset.full_init()
            length = len(dataset)
    except Exception as error:  # readers raise all kinds on malformed content
        text = f'{type(dataset).__name__}: {describe(error)} ({part.place})'
        note(Finding('dataset-empty' if 'is empty' in text else 'dataset-unreadable', place, text))
        return
    part.__post_init__()  # its class names may come from its files
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
        label = info.get('gt_label')
        seen.add(label, image, image, '')
        _judge_instances(info, part, image, note)
        label_map = info.get('seg_map_path')
        size = (info['width'], info['height']) if 'width' in info and 'height' in info else None
        labelled = (label_map, part.map_rule(info)) if label_map and part.with_map else None
        yield Sample(image, info.get('img_id'), size, label if isinstance(label, int) else None, labelled)
    seen.finish(place)


class _Labels:
    """Compares labels of whole images with the classes."""

    def __init__(self, part: Part, note: Note) -> None:
        self._part, self._note = part, note
        self._seen: set[int] = set()
        self._single = True

    def add(self, label: Any, image: str, path: str, text: str) -> None:
        """Add an image's label, labels or ``None``; a finding on it names ``path`` and ``text``."""
        if isinstance(label, int):
            folder = os.path.basename(os.path.dirname(image))  # noqa: PTH119, PTH120 (a path or an address)
            self._part.folders.setdefault(folder, set()).add(label)
        labels = label if isinstance(label, list | tuple) else [] if label is None else [label]
        self._seen.update(labels)
        self._single = self._single and isinstance(label, int)
        limit = self._part.num_classes
        wrong = [value for value in labels if value < 0 or (limit is not None and value >= limit)]
        if wrong:
            text = f'label {some_of(wrong)}' + (f', {text}' if text else '')
            classes = f'; classes are 0 .. {limit - 1}' if limit else ''
            self._note(Finding('label-out-of-range', path, text + classes))

    def finish(self, path: str) -> None:
        """Report classes without samples."""
        if self._seen and self._part.trains:
            if self._single and len(self._seen) == 1:
                self._note(Finding('label-of-all', path, f'all samples have label {self._seen.pop()}'))
                return
            for number, name in enumerate(self._part.classes):
                if number not in self._seen:
                    self._note(Finding('class-without-samples', path, f'{name} (label {number})'))


def _judge_instances(info: dict, part: Part, path: str, note: Note) -> None:
    """Boxes [left, top, right, bottom] of data sets that are not COCO's."""
    instances, image_id = info.get('instances') or [], info.get('img_id')
    if instances and not min(info.get('width', 1), info.get('height', 1)) > 0:
        note(Finding('size-not-positive', path, f'{info["width"]} x {info["height"]}', image_id))
    for number, instance in enumerate(instances):
        box, label = instance.get('bbox'), instance.get('bbox_label')
        text = f'instance {number}: {box}'
        if isinstance(label, int) and part.classes and not 0 <= label < len(part.classes):
            note(Finding('label-out-of-range', path, f'instance {number}: label {label}', image_id))
        if not isinstance(box, list | tuple) or len(box) != 4:
            continue
        if not all(map(math.isfinite, box)):
            note(Finding('box-not-finite', path, text, image_id))
        elif box[2] - box[0] < 0 or box[3] - box[1] < 0:
            note(Finding('box-negative', path, text, image_id))
        elif box[2] - box[0] < 1 or box[3] - box[1] < 1:
            note(Finding('box-degenerate', path, text, image_id))
    if part.trains and 'instances' in info and not instances:
        note(Finding('image-without-annotation', path, '', image_id))
