"""Pascal VOC annotations, one XML file for each image, as mmdet's ``XMLDataset`` reads them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from mmengine.fileio import get, list_from_file

from vheat_mm.datasets.checks.datasets import Part
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.utils.errors import describe
from vheat_mm.utils.text import some_of


def read_voc(part: Part, note: Callable[[Finding], None]) -> Iterator[dict[str, Any]]:
    """Read the files that an ``XMLDataset`` lists, as its ``load_data_list`` does; findings go to ``note``.

    mmdet drops objects of unknown names without a word, and does not name the file that it cannot read.
    """
    dataset = part.dataset
    dataset.cat2label = {name: label for label, name in enumerate(part.classes)}
    names: Counter[str] = Counter()
    first: dict[str, str] = {}  # name -> the first file that has it
    for image_id in list_from_file(dataset.ann_file, backend_args=dataset.backend_args):
        image = os.path.join(dataset.img_subdir, f'{image_id}.jpg')  # noqa: PTH118 (or an address)
        path = os.path.join(dataset.sub_data_root, dataset.ann_subdir, f'{image_id}.xml')  # noqa: PTH118
        try:
            root = ElementTree.fromstring(get(path, backend_args=dataset.backend_args))
            info = dataset.parse_data_info(dict(img_id=image_id, file_name=image, xml_path=path))
        except Exception as error:  # of the file, its values, or an image that is read for its size
            is_bare = isinstance(error, AttributeError)  # of None
            text = 'an object lacks name, bndbox or a corner, or size a side' if is_bare else describe(error)
            note(Finding('xml-malformed', path, text, image_id))
            continue
        for entry in root.iterfind('object/name'):
            name = entry.text or ''
            names[name] += 1
            first.setdefault(name, path)
        yield info
    for finding in _judge_names(part, names, first):
        note(finding)


def _judge_names(part: Part, names: Counter[str], first: dict[str, str]) -> Iterator[Finding]:
    """Names of objects that ``metainfo.classes`` lacks; those of the data set's own list are left out on purpose."""
    place, classes = part.dataset.ann_file, part.classes
    published = getattr(type(part.dataset), 'METAINFO', {}).get('classes') or ()
    unknown = {name: count for name, count in names.most_common() if name not in classes and name not in published}
    absent = [name for name in classes if name not in names]
    if part.trains and len(absent) < len(classes):
        yield from (Finding('class-without-samples', place, name) for name in absent)
    if unknown:
        listed = some_of(f'{name!r} ({count} objects, first in {first[name]})' for name, count in unknown.items())
        alike = [name for name in unknown if any(plain_name(name) == plain_name(known) for known in classes)]
        is_many = 2 * sum(unknown.values()) > names.total() or (part.trains and absent)
        kind = 'names-unknown' if alike or is_many else 'names-left-out'
        yield Finding(kind, place, f'{listed}; metainfo.classes: [{some_of(classes)}]')


def plain_name(name: str) -> str:
    """A class name without what is easily mistaken: case, spaces, underscores."""
    return ' '.join(name.replace('_', ' ').split()).casefold()
