"""A COCO annotation file: its records, boxes and masks, against each other and against the classes.

The file is read entry by entry into arrays: 100 bytes an annotation, whatever its polygons hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vheat_mm.datasets.checks.json_stream import MalformedJsonError, iterate
from vheat_mm.datasets.checks.masks import MaskTable
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.utils.text import some_of

_BATCH = 50_000
_NUMBERS = {int, float}
_NEEDED = dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'))
_NEEDED_BY_BOXES = ('id', 'image_id', 'category_id', 'bbox', 'area')


class CocoImage(NamedTuple):
    """An entry of ``images``."""

    id: Any
    file_name: str
    width: float
    height: float


@dataclass
class CocoContent:
    """What a COCO file holds.

    Attributes:
        path: Of the file.
        images: In its order; of those with one id, the last.
        categories: (id, name), in its order.
        boxes: (N, 5) x, y, width, height and area of the annotations; NaN where they are malformed.
        owners: (N,) place of the image in ``image_ids``.
        labels: (N,) place of the category in ``category_ids``.
        judged: (N,) false where mmdet ignores the annotation, or where its form has been reported already.
        image_ids: Ids that images or annotations name, each with its place; ``category_ids`` alike.
        spoilt: Places of images with a record that has been reported: what follows from it is not.
        findings: What reading has shown.
    """

    path: str
    images: dict[int, CocoImage] = field(default_factory=dict)
    categories: list[tuple[Any, str]] = field(default_factory=list)
    annotation_ids: list = field(default_factory=list)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 5)))
    owners: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    judged: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    masks: MaskTable = field(default_factory=MaskTable)
    image_ids: dict[Any, int] = field(default_factory=dict)
    category_ids: dict[Any, int] = field(default_factory=dict)
    spoilt: set[int] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @cached_property
    def names(self) -> tuple[list, list]:
        """Ids of images and of categories by their places; for when the file has been read."""
        return list(self.image_ids), list(self.category_ids)


def read_coco(path: str) -> CocoContent:
    """Read a COCO file.

    Raises:
        MalformedJsonError: It is no JSON object.
        OSError: It cannot be read.
    """
    content = CocoContent(path)
    rows = _Rows(content)
    for key, index, entry in iterate(path):
        if index is None:
            if key in ('images', 'annotations', 'categories') and entry != []:
                raise MalformedJsonError(f'{key!r} is a {type(entry).__name__}, expected a list')
        elif key == 'annotations':
            rows.add(index, entry)
        elif key in _NEEDED and _complete(content, key, index, entry, _NEEDED[key]):
            _add_record(content, key, index, entry)
    rows.finish()
    return content


def _complete(content: CocoContent, key: str, index: int, entry: Any, needed: tuple[str, ...]) -> bool:
    """Whether a record can be used; what it lacks goes into the findings."""
    if not isinstance(entry, dict):
        text = f'{key}[{index}] is a {type(entry).__name__}, expected an object'
        content.findings.append(Finding('json-record', content.path, text))
        return False
    lacking = [name for name in needed if name not in entry]
    ids = [name for name in ('id', 'image_id', 'category_id') if isinstance(entry.get(name), dict | list)]
    if lacking or ids:
        text = f'{key}[{index}] lacks {", ".join(lacking)}' if lacking else f'{key}[{index}]: {ids[0]} is no number'
        image = entry.get('id' if key == 'images' else 'image_id')
        annotation = entry.get('id') if key == 'annotations' else None
        kind = 'json-field-missing' if lacking else 'json-record'
        content.findings.append(Finding(kind, content.path, text, image, annotation))
        if key != 'categories' and image is not None and not isinstance(image, dict | list):
            content.spoilt.add(content.image_ids.setdefault(image, len(content.image_ids)))
    return not lacking and not ids


def _add_record(content: CocoContent, key: str, index: int, entry: dict) -> None:
    if key == 'categories':
        content.categories.append((entry['id'], entry['name']))
        return
    image = CocoImage(*(entry[name] for name in _NEEDED['images']))
    if not isinstance(image.file_name, str) or not {type(image.width), type(image.height)} <= _NUMBERS:
        text = f'images[{index}]: file_name {image.file_name!r}, size {image.width!r} x {image.height!r}'
        content.findings.append(Finding('json-record', content.path, text, image.id))
        content.spoilt.add(content.image_ids.setdefault(image.id, len(content.image_ids)))
        return
    place = content.image_ids.setdefault(image.id, len(content.image_ids))
    if place in content.images:
        text = f'{content.images[place].file_name} and {image.file_name}'
        content.findings.append(Finding('duplicate-image-id', content.path, text, image.id))
    if not (image.width > 0 and image.height > 0):
        text = f'{image.width} x {image.height} ({image.file_name})'
        content.findings.append(Finding('size-not-positive', content.path, text, image.id))
    content.images[place] = image


class _Rows:
    """Annotations on their way into arrays."""

    def __init__(self, content: CocoContent) -> None:
        self._content = content
        self._boxes: list[tuple] = []
        self._keys: list[tuple[int, int, bool]] = []
        self._done: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, index: int, entry: Any) -> None:
        content = self._content
        if not _complete(content, 'annotations', index, entry, _NEEDED_BY_BOXES):
            return
        box, area = entry['bbox'], entry['area']
        well = isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= _NUMBERS and type(area) in _NUMBERS
        if not well:
            text = f'bbox {box!r}, area {area!r}'[:120]
            finding = Finding('box-malformed', content.path, text, entry['image_id'], entry['id'])
            content.findings.append(finding)
        content.annotation_ids.append(entry['id'])
        owner = content.image_ids.setdefault(entry['image_id'], len(content.image_ids))
        label = content.category_ids.setdefault(entry['category_id'], len(content.category_ids))
        self._keys.append((owner, label, well and not entry.get('ignore', False)))
        self._boxes.append((*box, area) if well else (math.nan,) * 5)
        content.masks.add(entry.get('segmentation'))
        if len(self._keys) == _BATCH:
            self._flush()

    def finish(self) -> None:
        self._flush()
        content = self._content
        content.boxes = np.concatenate([boxes for boxes, _ in self._done])
        keys = np.concatenate([keys for _, keys in self._done])
        content.owners, content.labels, content.judged = keys[:, 0], keys[:, 1], keys[:, 2].astype(bool)

    def _flush(self) -> None:
        boxes = np.array(self._boxes, dtype=np.float64).reshape(-1, 5)
        self._done.append((boxes, np.array(self._keys, dtype=np.int32).reshape(-1, 3)))
        self._content.masks.flush()
        self._boxes, self._keys = [], []


def judge_coco(content: CocoContent, classes: tuple[str, ...], trains: bool, with_mask: bool) -> Iterator[Finding]:
    """Compare the records of a file with each other.

    Args:
        content: Of the file.
        classes: ``metainfo.classes``; none for what is only predicted on.
        trains: Whether a training learns from it: images without objects then matter.
        with_mask: Whether its masks are loaded.
    """
    yield from content.findings
    if mismatch := compare_classes([name for _, name in content.categories], classes):
        yield Finding(mismatch[0], content.path, mismatch[1])
    seen = set()
    for row, annotation in enumerate(content.annotation_ids):
        if annotation in seen:
            yield _annotation_finding(content, 'duplicate-annotation-id', row)
        seen.add(annotation)
    faults, kept, edges = _judge_boxes(content, classes)
    for kind, rows in faults.items():
        for row in rows.nonzero()[0].tolist():
            yield _annotation_finding(content, kind, row)
    if with_mask:
        yield from _judge_masks(content, kept, edges)
    if not content.images:
        yield Finding('data-set-empty', content.path, 'it names no usable image')
    elif trains:
        if not kept.any():
            text = f'{len(content.annotation_ids)} annotations, {len(content.images)} images'
            yield Finding('nothing-to-learn', content.path, text)
        annotated = content.spoilt.union(content.owners.tolist())
        for place, image in content.images.items():
            if place not in annotated:
                yield Finding('image-without-annotation', content.path, image.file_name, image.id)


def compare_classes(names: list[str], classes: tuple[str, ...]) -> tuple[str, str] | None:
    """Kind of finding and text where the categories' names do not match ``metainfo.classes``."""
    known = [name for name in names if name in classes]
    if missing := [name for name in classes if name not in known]:
        return 'classes-missing', f'its categories [{some_of(names)}] lack [{some_of(missing)}] of metainfo.classes'
    if known != list(classes):
        order = f'[{some_of(known)}], metainfo.classes in [{some_of(list(classes))}]'
        return (
            'classes-order',
            f'its categories come in the order {order}; labels are numbered in the order of the file',
        )
    return None


def _judge_boxes(
    content: CocoContent, classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """By kind, which annotations (N,); those that are learned (N,); width and height of their images (N, 2)."""
    edges = np.full((len(content.image_ids) + 1, 2), np.nan)
    for place, image in content.images.items():
        edges[place] = image.width, image.height
    known = ~np.isnan(edges[content.owners, 0])
    edges = edges[content.owners]
    ids = {category for category, _ in content.categories}
    chosen = {category for category, name in content.categories if name in set(classes)}
    listed = np.array([category in ids for category in content.category_ids] + [False])[content.labels]
    learned = np.array([category in chosen for category in content.category_ids] + [False])[content.labels]

    low, size, area = content.boxes[:, :2], content.boxes[:, 2:4], content.boxes[:, 4]
    with np.errstate(invalid='ignore'):
        high = low + size
        shared = np.minimum(high, edges) - np.maximum(low, 0)
        open_ = known & content.judged
        spoilt = np.isin(content.owners, list(content.spoilt))
        faults = {'annotation-of-no-image': ~known & ~spoilt, 'category-unknown': open_ & ~listed}
        for kind, wrong in (
            ('box-not-finite', ~np.isfinite(content.boxes[:, :4]).all(axis=1)),
            ('box-negative', (size < 0).any(axis=1)),
            ('box-degenerate', (size < 1).any(axis=1)),
            ('box-outside', (shared <= 0).any(axis=1) & (edges > 0).all(axis=1)),
            ('area-not-positive', area <= 0),
        ):
            faults[kind] = open_ & wrong
            open_ = open_ & ~wrong
        beyond = ((low < -1) | (high > edges + 1)).any(axis=1)
        faults['box-beyond-edge'] = open_ & beyond & (edges > 0).all(axis=1)
    return faults, open_ & learned & (edges > 0).all(axis=1), edges


def _judge_masks(content: CocoContent, kept: np.ndarray, edges: np.ndarray) -> Iterator[Finding]:
    extents = content.masks.extents()
    with np.errstate(invalid='ignore'):
        outside = kept & ((extents[:, 2:] <= 0) | (extents[:, :2] >= edges)).any(axis=1)
        beyond = kept & ~outside & ((extents[:, :2] < -1) | (extents[:, 2:] > edges + 1)).any(axis=1)
    for row, (kind, text) in content.masks.faults.items():
        if kept[row]:
            yield _annotation_finding(content, kind, row, text)
    for kind, rows in (('mask-outside', outside), ('mask-beyond-edge', beyond)):
        for row in rows.nonzero()[0].tolist():
            if content.masks.faults.get(row, ('',))[0] != 'mask-not-finite':
                left, top, right, bottom = extents[row].tolist()
                text = f'x {left:g} .. {right:g}, y {top:g} .. {bottom:g}'
                yield _annotation_finding(content, kind, row, f'{text}, image {_size(edges[row])}')
    for row, size in content.masks.sizes.items():
        if kept[row] and tuple(edges[row]) != size:
            yield _annotation_finding(content, 'rle-size', row, f'{_size(size)}, image {_size(edges[row])}')


def _annotation_finding(content: CocoContent, kind: str, row: int, text: str | None = None) -> Finding:
    """A finding on an annotation, with its box where there is nothing else to say."""
    owner = int(content.owners[row])
    image = content.images.get(owner)
    if text is None:
        x, y, width, height, area = content.boxes[row].tolist()
        text = f'bbox [{x:g}, {y:g}, {width:g}, {height:g}]'
        if kind == 'area-not-positive':
            text += f', area {area:g}'
        if kind == 'category-unknown':
            text = f'category_id {content.names[1][content.labels[row]]!r}'
        elif image is not None:
            text += f', image {image.width:g} x {image.height:g}'
    if image is not None:
        text = f'{text} ({image.file_name})' if text else image.file_name
    image_id = image.id if image is not None else content.names[0][owner]
    return Finding(kind, content.path, text, image_id, content.annotation_ids[row])


def _size(size: Any) -> str:
    return f'{size[0]:g} x {size[1]:g}'
