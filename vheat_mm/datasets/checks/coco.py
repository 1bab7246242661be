"""A COCO annotation file: its entries, boxes and masks compared with each other and with the classes.

Memory: the text of the file and some 700 bytes an annotation, however long its polygons are.
"""

from __future__ import annotations

import contextlib
import gc
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vheat_mm.datasets.checks.json_file import MalformedJsonError, read_object
from vheat_mm.datasets.checks.masks import MaskTable
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.utils.text import some_of

_LARGEST = 2**63  # of integers: beyond, numpy and pycocotools stop
_NOT_VALID = array('d', [math.nan] * 5)
_FEW = 3  # boxes that say nothing about all others
_NEEDED = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
_IDS = dict(images=('id',), annotations=('id', 'image_id', 'category_id'), categories=('id',))


class CocoImage(NamedTuple):
    """An entry of ``images``."""

    id: Any
    file_name: str
    width: float
    height: float


@dataclass
class CocoContent:
    """What a COCO file holds: N annotations that are complete, and the images and categories.

    Attributes:
        path: Of the file.
        images: By index in ``image_ids``; of several with one id, the last.
        categories: (id, name), in their order.
        annotation_ids: N ids.
        boxes: (N, 5) x, y, width, height and area in pixels; NaN where they are malformed.
        image_index: (N,) index of the annotation's image in ``image_ids``.
        category_index: (N,) index of its category in ``category_ids``.
        is_judged: (N,) false where mmdet ignores the annotation, or where it is malformed and reported.
        masks: Those of all annotations; ``mask_rows`` (N,) are rows in it.
        image_ids: Ids in images or annotations -> index; ``category_ids`` likewise.
        reported: Indices of images with an entry that is reported: what follows from that is not.
        findings: What reading has found.
        crowds: 'missing' and 'malformed' -> rows of annotations whose ``iscrowd`` is so.
    """

    path: str
    images: dict[int, CocoImage] = field(default_factory=dict)
    categories: list[tuple[Any, str]] = field(default_factory=list)
    annotation_ids: list = field(default_factory=list)
    boxes: np.ndarray = field(init=False)
    image_index: np.ndarray = field(init=False)
    category_index: np.ndarray = field(init=False)
    is_judged: np.ndarray = field(init=False)
    masks: MaskTable = field(default_factory=MaskTable)
    mask_rows: np.ndarray = field(init=False)
    image_ids: dict[Any, int] = field(default_factory=dict)
    category_ids: dict[Any, int] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    crowds: dict[str, list[int]] = field(default_factory=lambda: dict(missing=[], malformed=[]))

    @cached_property
    def ids(self) -> tuple[list, list]:
        """Ids of images and of categories by index, once the file has been read."""
        return list(self.image_ids), list(self.category_ids)

    def index_of(self, image_id: Any) -> int:
        """Index of an image."""
        return self.image_ids.setdefault(image_id, len(self.image_ids))

    def report(self, kind: str, text: str, image_id: Any = None, annotation_id: Any = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, self.path, text, image_id, annotation_id))


def read_coco(path: str, with_mask: bool = True) -> CocoContent:
    """Read a COCO file.

    Args:
        path: The file.
        with_mask: Whether its masks are judged later; they take a third of the time.

    Raises:
        MalformedJsonError: It is no JSON object.
        OSError: It cannot be read.
    """
    content = CocoContent(path)

    def reduce(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            _report_twice(content, pairs, entry)
        if 'segmentation' in entry:  # most of the file
            entry['segmentation'] = content.masks.add(entry['segmentation']) if with_mask else 0
        return entry

    was_enabled = gc.isenabled()
    gc.disable()  # it would look at a million new objects again and again
    try:
        _fill(content, read_object(path, reduce))
    finally:
        if was_enabled:
            gc.enable()
    return content


def _fill(content: CocoContent, found: dict[str, Any]) -> None:
    boxes, keys = array('d'), array('i')
    for key in _NEEDED:
        entries = found.get(key, [])
        if not isinstance(entries, list):
            raise MalformedJsonError(f'{key!r} is a {type(entries).__name__}, expected a list')
        for index, entry in enumerate(entries):
            if not _is_complete(content, key, index, entry):
                continue
            if key == 'annotations':
                _add_annotation(content, entry, boxes, keys)
            elif key == 'images':
                _add_image(content, index, entry)
            else:
                content.categories.append((entry['id'], entry['name']))
    content.boxes = np.array(boxes).reshape(-1, 5)
    content.image_index, content.category_index, judged, content.mask_rows = np.array(keys).reshape(-1, 4).T
    content.is_judged = judged.astype(bool)


def _report_twice(content: CocoContent, pairs: list[tuple[str, Any]], entry: dict) -> None:
    """Report keys that occur twice in an object: JSON readers drop the first value without a word."""
    keys = [key for key, _ in pairs]
    twice = [key for key in entry if keys.count(key) > 1]
    content.report('json-key-twice', some_of([f'{key!r}' for key in twice]), entry.get('image_id'), entry.get('id'))


def _is_number(value: Any) -> bool:
    return -_LARGEST < value < _LARGEST if type(value) is int else type(value) is float


def _is_id(value: Any) -> bool:
    if type(value) is int:
        return -_LARGEST < value < _LARGEST
    return type(value) is str or (type(value) is float and value.is_integer())


def _is_complete(content: CocoContent, key: str, index: int, entry: Any) -> bool:
    """Whether an entry can be used; what it lacks is reported."""
    if not isinstance(entry, dict):
        content.report('json-entry-malformed', f'{key}[{index}] is a {type(entry).__name__}, expected an object')
        return False
    lacking = [name for name in _NEEDED[key] if name not in entry]
    wrong = [name for name in _IDS[key] if name in entry and not _is_id(entry[name])]
    wrong += ['name'] if key == 'categories' and 'name' in entry and not isinstance(entry['name'], str) else []
    if not lacking and not wrong:
        return True
    ids = (entry.get(name) for name in ('id' if key == 'images' else 'image_id', 'id'))
    image, own = (value if _is_id(value) else None for value in ids)
    annotation = own if key == 'annotations' else None
    if lacking:
        content.report('json-field-missing', f'{key}[{index}] lacks {", ".join(lacking)}', image, annotation)
    else:
        text = f'{key}[{index}]: {wrong[0]} is {entry[wrong[0]]!r}'
        content.report('json-entry-malformed', text[:200], image, annotation)
    if key != 'categories' and image is not None:
        content.reported.add(content.index_of(image))
    return False


def _add_image(content: CocoContent, position: int, entry: dict) -> None:
    image = CocoImage(*(entry[name] for name in _NEEDED['images']))
    index = content.index_of(image.id)
    if not isinstance(image.file_name, str) or not (_is_number(image.width) and _is_number(image.height)):
        text = f'images[{position}]: file_name {image.file_name!r}, size {image.width!r} x {image.height!r}'
        content.report('json-entry-malformed', text[:200], image.id)
        content.reported.add(index)
        return
    if index in content.images:
        content.report('duplicate-image-id', f'{content.images[index].file_name} and {image.file_name}', image.id)
    if not (image.width > 0 and image.height > 0):
        content.report('size-not-positive', f'{image.width} x {image.height} ({image.file_name})', image.id)
    content.images[index] = image


def _add_annotation(content: CocoContent, entry: dict, boxes: array, keys: array) -> None:
    """Add an annotation: x, y, width, height and area to ``boxes``; two indices, if judged, row of mask to ``keys``."""
    box, area = entry['bbox'], entry['area']
    numbers = _NOT_VALID
    if isinstance(box, list) and len(box) == 4 and {type(area), *map(type, box)} <= {int, float}:
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            numbers = array('d', (*box, area))
    valid = numbers is not _NOT_VALID
    if not valid:
        content.report('box-malformed', f'bbox {box!r}, area {area!r}'[:120], entry['image_id'], entry['id'])
    if (crowd := entry.get('iscrowd')) not in (0, 1):
        content.crowds['missing' if crowd is None else 'malformed'].append(len(content.annotation_ids))
    content.annotation_ids.append(entry['id'])
    category = content.category_ids.setdefault(entry['category_id'], len(content.category_ids))
    judged = valid and not entry.get('ignore', False)
    keys.extend((content.index_of(entry['image_id']), category, judged, entry.get('segmentation', 0)))
    boxes.extend(numbers)


def judge_coco(
    content: CocoContent, classes: tuple[str, ...], trains: bool, with_mask: bool, evaluated: bool = False
) -> Iterator[Finding]:
    """Compare the entries of a file with each other.

    Args:
        content: Of the file.
        classes: ``metainfo.classes``; none where the data are only predicted on.
        trains: Whether training uses it: images without objects then matter.
        with_mask: Whether its masks are loaded.
        evaluated: Whether pycocotools reads it to compute a score.
    """
    yield from content.findings
    for name, crowds in content.crowds.items():
        if crowds:
            kind = 'iscrowd-unusable' if evaluated or name == 'malformed' else 'iscrowd-missing'
            text = f'{name} in {len(crowds)} of {len(content.annotation_ids)} annotations'
            yield _annotation_finding(content, kind, crowds[0], text)
    if mismatch := compare_classes([name for _, name in content.categories], classes):
        yield Finding(mismatch[0], content.path, mismatch[1])
    elif classes:
        names = dict(content.categories)
        counts = {
            names.get(key): number
            for key, number in zip(content.ids[1], np.bincount(content.category_index), strict=False)
        }
        if left := [f'{name!r} ({number} objects)' for name, number in counts.items() if name not in (None, *classes)]:
            yield Finding('names-left-out', content.path, f'{some_of(left)}; metainfo.classes: [{some_of(classes)}]')
    seen = set()
    for row, annotation in enumerate(content.annotation_ids):
        if annotation in seen:
            yield _annotation_finding(content, 'duplicate-annotation-id', row)
        seen.add(annotation)
    faults, kept, sizes = _judge_boxes(content, classes)
    yield from _judge_types_of_ids(content, faults, evaluated)
    yield from _judge_form_of_boxes(content, sizes)
    for kind, rows in faults.items():
        for row in rows.nonzero()[0].tolist():
            yield _annotation_finding(content, kind, row)
    if with_mask:
        yield from _judge_masks(content, kept, sizes)
    if trains and content.images:
        if not kept.any():
            text = f'{len(content.annotation_ids)} annotations, {len(content.images)} images'
            yield Finding('no-usable-annotation', content.path, text)
        learned = {content.ids[1][index] for index in set(content.category_index[kept].tolist())}
        found = {name for category, name in content.categories if category in learned}
        for name in dict(content.categories).values() if learned else ():
            if name in classes and name not in found:
                yield Finding('class-without-samples', content.path, name)
        annotated = content.reported.union(content.image_index.tolist())
        for index, image in content.images.items():
            if index not in annotated:
                yield Finding('image-without-annotation', content.path, image.file_name, image.id)


def compare_classes(names: list[str], classes: tuple[str, ...]) -> tuple[str, str] | None:
    """Kind of finding and text where the categories' names do not match ``metainfo.classes``."""
    known = [name for name in names if name in classes]
    if twice := [name for name in classes if known.count(name) > 1]:
        return 'category-twice', f'several of its categories are named {some_of(twice)}'
    if missing := [name for name in classes if name not in known]:
        return 'classes-missing', f'its categories [{some_of(names)}] lack [{some_of(missing)}] of metainfo.classes'
    if known != list(classes):
        order = f'[{some_of(known)}], metainfo.classes in [{some_of(list(classes))}]'
        return 'classes-order', f'its categories come in the order {order}; labels follow the order of the file'
    return None


def _judge_types_of_ids(content: CocoContent, faults: dict[str, np.ndarray], evaluated: bool) -> Iterator[Finding]:
    """Ids that are text in one place and numbers in another; the rows are removed from ``faults``."""
    images, categories = content.ids
    for kind, name, of_rows, all_ids, targets in (
        ('annotation-without-image', 'image_id', content.image_index, images, map(images.__getitem__, content.images)),
        ('category-unknown', 'category_id', content.category_index, categories, dict(content.categories)),
    ):
        by_text = {str(target): target for target in targets}
        for row in faults[kind].nonzero()[0].tolist():
            value = all_ids[of_rows[row]]
            if str(value) in by_text:
                faults[kind][row] = False
                yield _annotation_finding(content, 'id-type', row, f'{name} {value!r}, id {by_text[str(value)]!r}')
    texts = [row for row, value in enumerate(content.annotation_ids) if isinstance(value, str)]
    if evaluated and texts:
        text = f'{len(texts)} ids of annotations are text: {content.annotation_ids[texts[0]]!r}'
        yield _annotation_finding(content, 'id-type', texts[0], text)


def _judge_form_of_boxes(content: CocoContent, sizes: np.ndarray) -> Iterator[Finding]:
    """Boxes that are all written in another form than COCO's."""
    rows = (content.is_judged & (sizes > 2).all(axis=1)).nonzero()[0]
    boxes, sizes = content.boxes[rows, :4], sizes[rows]
    if len(rows) < _FEW or not np.isfinite(boxes).all():
        return
    low, high = boxes[:, :2], boxes[:, 2:]
    beyond = (low + high > sizes + 1).any(axis=1)
    if (boxes <= 1).all():
        yield _annotation_finding(content, 'boxes-normalised', int(rows[0]))
    elif beyond.sum() >= max(_FEW, len(rows) / 10) and (high > low).all() and (high <= sizes + 1).all():
        text = f'all {len(rows)} fit their images as two corners; as [x, y, width, height], {int(beyond.sum())} do not'
        yield _annotation_finding(content, 'boxes-as-corners', int(rows[beyond.argmax()]), text)


def _judge_boxes(
    content: CocoContent, classes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """By kind, which annotations (N,); which are learned (N,); (width, height) of their images (N, 2)."""
    sizes = np.full((len(content.image_ids) + 1, 2), np.nan)
    for index, image in content.images.items():
        sizes[index] = image.width, image.height
    sizes = sizes[content.image_index]
    known, sized = ~np.isnan(sizes[:, 0]), (sizes > 0).all(axis=1)
    listed = {category for category, _ in content.categories}
    chosen = {category for category, name in content.categories if name in classes}
    is_listed, is_chosen = (
        np.array([category in ids for category in content.category_ids] + [False])[content.category_index]
        for ids in (listed, chosen)
    )
    low, size, area = content.boxes[:, :2], content.boxes[:, 2:4], content.boxes[:, 4]
    with np.errstate(invalid='ignore'):
        high = low + size
        shared = np.minimum(high, sizes) - np.maximum(low, 0)
        fine = known & content.is_judged
        reported = np.isin(content.image_index, list(content.reported))
        faults = {'annotation-without-image': ~known & ~reported, 'category-unknown': fine & ~is_listed}
        for kind, wrong in (
            ('box-not-finite', ~np.isfinite(content.boxes[:, :4]).all(axis=1)),
            ('box-negative', (size < 0).any(axis=1)),
            ('box-degenerate', (size < 1).any(axis=1)),
            ('box-outside', (shared <= 0).any(axis=1) & sized),
            ('area-not-positive', area <= 0),
        ):
            faults[kind] = fine & wrong
            fine = fine & ~wrong
        faults['box-beyond-edge'] = fine & ((low < -1) | (high > sizes + 1)).any(axis=1) & sized
    return faults, fine & is_chosen & sized, sizes


def _judge_masks(content: CocoContent, kept: np.ndarray, sizes: np.ndarray) -> Iterator[Finding]:
    extents = content.masks.extents()[content.mask_rows]
    with np.errstate(invalid='ignore'):
        outside = kept & ((extents[:, 2:] <= 0) | (extents[:, :2] >= sizes)).any(axis=1)
        beyond = kept & ~outside & ((extents[:, :2] < -1) | (extents[:, 2:] > sizes + 1)).any(axis=1)
    for row, mask in enumerate(content.mask_rows.tolist()):
        if not kept[row]:
            continue
        if mask in content.masks.faults:
            kind, text = content.masks.faults[mask]
            yield _annotation_finding(content, kind, row, text)
        size = content.masks.rle_sizes.get(mask)
        if size is not None and tuple(sizes[row]) != size:
            yield _annotation_finding(content, 'rle-size', row, f'{_size(size)}, image {_size(sizes[row])}')
    for kind, rows in (('mask-outside', outside), ('mask-beyond-edge', beyond)):
        for row in rows.nonzero()[0].tolist():
            left, top, right, bottom = extents[row].tolist()
            text = f'x {left:g} .. {right:g}, y {top:g} .. {bottom:g}, image {_size(sizes[row])}'
            yield _annotation_finding(content, kind, row, text)


def _annotation_finding(content: CocoContent, kind: str, row: int, text: str | None = None) -> Finding:
    """A finding on an annotation, with its box where there is no other text."""
    index = int(content.image_index[row])
    image = content.images.get(index)
    if text is None:
        x, y, width, height, area = content.boxes[row].tolist()
        text = f'bbox [{x:g}, {y:g}, {width:g}, {height:g}]'
        if kind == 'area-not-positive':
            text += f', area {area:g}'
        if kind == 'category-unknown':
            text = f'category_id {content.ids[1][content.category_index[row]]!r}'
        elif image is not None:
            text += f', image {_size((image.width, image.height))}'
    if image is not None:
        text = f'{text} ({image.file_name})' if text else image.file_name
    return Finding(kind, content.path, text, content.ids[0][index], content.annotation_ids[row])


def _size(size: Any) -> str:
    return f'{size[0]:g} x {size[1]:g}'
