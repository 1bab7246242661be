"""Pascal VOC annotations, one XML file for each image, as mmdet's ``XMLDataset`` reads them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from mmengine.fileio import exists, get, list_from_file

from vheat_mm.datasets.checks.report import Finding
from vheat_mm.utils.text import some_of


def read_voc(
    dataset: Any, classes: tuple[str, ...], trains: bool, note: Callable[[Finding], None]
) -> Iterator[dict[str, Any]]:
    """Read the files that an ``XMLDataset`` lists, as its ``parse_data_info`` does; findings go to ``note``.

    mmdet drops objects of unknown names without a word, and does not name the file that it cannot read.
    """
    names: Counter[str] = Counter()
    first: dict[str, str] = {}  # name -> the first file that has it
    for image_id in list_from_file(dataset.ann_file, backend_args=dataset.backend_args):
        path = os.path.join(dataset.sub_data_root, dataset.ann_subdir, f'{image_id}.xml')  # noqa: PTH118 (or an address)
        if not exists(path, backend_args=dataset.backend_args):
            note(Finding('xml-malformed', path, 'there is no such file', image_id))
            continue
        image = os.path.join(dataset.sub_data_root, dataset.img_subdir, f'{image_id}.jpg')  # noqa: PTH118
        info = dict(img_path=image, img_id=image_id)
        try:
            root = ElementTree.fromstring(get(path, backend_args=dataset.backend_args))
            found = [_read_object(entry, number) for number, entry in enumerate(root.findall('object'))]
            if (size := root.find('size')) is not None:
                info |= {key: int(_text(size, key, 'size')) for key in ('width', 'height')}
        except (ElementTree.ParseError, OSError, ValueError) as error:
            note(Finding('xml-malformed', path, str(error), image_id))
            continue
        for name, _ in found:
            names[name] += 1
            first.setdefault(name, path)
        known = [(classes.index(name), box) for name, box in found if name in classes]
        yield {**info, 'instances': [dict(bbox=box, bbox_label=label) for label, box in known]}
    for finding in _judge_names(dataset, names, first, classes, trains):
        note(finding)


def _read_object(entry: ElementTree.Element, number: int) -> tuple[str, list[int]]:
    """Name and left, top, right and bottom of an object, from 0 on.

    Raises:
        ValueError: It lacks one of them.
    """
    place = f'object {number}'
    box = entry.find('bndbox')
    if box is None:
        raise ValueError(f'{place} lacks bndbox')
    numbers = [float(_text(box, key, place)) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f'{place} has bndbox {numbers}')
    return _text(entry, 'name', place), [int(number) - 1 for number in numbers]


def _text(entry: ElementTree.Element, key: str, place: str) -> str:
    text = entry.findtext(key)
    if not text:
        raise ValueError(f'{place} lacks {key}')
    return text


def _judge_names(
    dataset: Any, names: Counter[str], first: dict[str, str], classes: tuple[str, ...], trains: bool
) -> Iterator[Finding]:
    """Names of objects that ``metainfo.classes`` lacks; those of the data set's own list are left out on purpose."""
    published = getattr(type(dataset), 'METAINFO', {}).get('classes') or ()
    unknown = {name: count for name, count in names.most_common() if name not in classes and name not in published}
    absent = [name for name in classes if name not in names]
    if trains and len(absent) < len(classes):
        yield from (Finding('class-without-samples', dataset.ann_file, name) for name in absent)
    if unknown:
        listed = some_of(f'{name!r} ({count} objects, first in {first[name]})' for name, count in unknown.items())
        alike = [name for name in unknown if any(plain_name(name) == plain_name(known) for known in classes)]
        is_many = 2 * sum(unknown.values()) > names.total() or (trains and absent)
        kind = 'names-unknown' if alike or is_many else 'names-left-out'
        yield Finding(kind, dataset.ann_file, f'{listed}; metainfo.classes: [{some_of(classes)}]')


def plain_name(name: str) -> str:
    """A class name without what is easily mistaken: case, spaces, underscores."""
    return ' '.join(name.replace('_', ' ').split()).casefold()
