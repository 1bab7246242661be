"""Detections in COCO's format, as pycocotools, annotation tools and :class:`mmdet.evaluation.CocoMetric` read them.

Boxes and scores are written as CocoMetric writes them, so that average precisions are those of ``tools/test.py``.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.inference.parts import Key, Parts, result_file
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import first_line, some_of
from vheat_mm.version import __version__


class CocoIds:
    """The ids of images and categories: 1, 2, 3, ..., or those of an existing COCO file.

    Args:
        classes: The model's.
        ann_file: A COCO file. Images are found in it by their names; else by the last parts of their names, where only
            one image of the file and only one input have these. Others get ids above the file's largest, which is said.
        chosen: The classes that are predicted; all by default. The others may be missing in the file.

    Attributes:
        categories: The entries of the classes.
        of_labels: The ids of the classes, by their numbers.

    Raises:
        ToolError: The file is none of COCO's, or lacks a class.
    """

    def __init__(
        self, classes: Sequence[str], ann_file: str | Path | None = None, chosen: Sequence[str] | None = None
    ) -> None:
        self._ann_file = ann_file
        self._exact: dict[str, int] = {}
        known = {name: number for number, name in enumerate(classes, 1)}
        if ann_file is not None:
            known = self._read(Path(ann_file), classes if chosen is None else chosen)
        self.of_labels = {label: known[name] for label, name in enumerate(classes) if name in known}
        self.categories = [dict(id=number, name=classes[label]) for label, number in self.of_labels.items()]

    def _read(self, path: Path, needed: Sequence[str]) -> dict[str, int]:
        """Take the ids of images, and return those of categories by name."""
        try:
            content = json.loads(path.read_bytes())
            ids = {str(entry['name']): int(entry['id']) for entry in content['categories']}
            self._exact = {str(entry['file_name']): int(entry['id']) for entry in content['images']}
        except (ValueError, KeyError, TypeError) as error:
            reason = f'no {error}' if isinstance(error, KeyError) else first_line(error)
            raise ToolError(f'--ann-file {path} lists no images and categories in COCO format: {reason}') from error
        if unknown := [name for name in needed if name not in ids]:
            raise ToolError(
                f'--ann-file {path} has no category {some_of(map(repr, unknown))}; it has {some_of(map(repr, ids))}. '
                'Choose among the classes with --classes, or leave --ann-file out'
            )
        return ids

    def of_images(self, keys: Iterable[Key]) -> list[int]:
        """Ids of images and frames, in their order."""
        if self._ann_file is None:
            return list(range(1, sum(1 for _ in keys) + 1))
        names = [_file_name(key) for key in keys]
        by_base = _unique_bases(self._exact)
        inputs = _unique_bases([name for name in names if name not in self._exact])
        taken = {self._exact[name] for name in names if name in self._exact}
        new = itertools.count(max(self._exact.values(), default=0) + 1)
        ids, missing = [], []
        for name in names:
            base = PurePosixPath(name).name
            if name in self._exact:
                ids.append(self._exact[name])
            elif base in by_base and base in inputs and self._exact[by_base[base]] not in taken:
                ids.append(self._exact[by_base[base]])
            else:
                ids.append(next(new))
                missing.append(name)
        if missing:
            print_log(
                f'{len(missing)} of {len(names)} images are not in {self._ann_file} ({some_of(missing, 3)}): they have '
                "ids above its largest, which pycocotools' loadRes refuses",
                'current',
                level=30,
            )
        return ids


def merge_coco(parts: Mapping[Path, Sequence[Item]], ids: CocoIds, target: Path) -> None:
    """Join the files of all processes and runs into one COCO file, in the order of the listing and of frames.

    Memory holds a few numbers an image, and the annotations of one image at a time.

    Args:
        parts: Files of :func:`coco_results`, each with the inputs whose lines in it count.
        ids: Of images and categories.
        target: The file to write.

    Raises:
        ToolError: The disk is full; ``target`` is as it was.
    """
    lines = Parts(parts)
    numbers = ids.of_images(lines.keys())
    with result_file(target) as file:

        def write_list(name: str, entries: Iterable[dict[str, Any]], end: str) -> None:
            file.write(f'"{name}": ['.encode('ascii'))
            for place, entry in enumerate(entries):
                file.write((',\n' if place else '\n').encode('ascii') + json.dumps(entry).encode('ascii'))
            file.write(f']{end}\n'.encode('ascii'))

        file.write(f'{{"info": {json.dumps(_info())},\n'.encode('ascii'))
        write_list('categories', ids.categories, ',')
        write_list('images', _images(lines, numbers), ',')
        write_list('annotations', _annotations(lines, numbers, ids.of_labels), '}')


def to_coco(predictions: Iterable[Prediction], classes: Sequence[str], score_thr: float = 0.0) -> dict[str, Any]:
    """Detections as the content of a COCO file.

    Args:
        predictions: Of a detector; those with an error are left out.
        classes: The model's.
        score_thr: Boxes with lower scores are left out.
    """
    ids = CocoIds(classes)
    found = [prediction for prediction in predictions if prediction.error is None]
    found.sort(key=lambda prediction: (prediction.item.index, prediction.frame or 0))
    lines = [(_key(prediction), coco_results(prediction, score_thr)) for prediction in found]
    numbers = ids.of_images(key for key, _ in lines)
    return dict(
        info=_info(),
        categories=ids.categories,
        images=list(_images(lines, numbers)),
        annotations=list(_annotations(lines, numbers, ids.of_labels)),
    )


class Boxes(NamedTuple):
    """Boxes of an image, see :class:`~vheat_mm.apis.inference.types.Prediction`."""

    corners: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


def kept_boxes(prediction: Prediction, score_thr: float) -> Boxes:
    """The boxes of a prediction with scores from a threshold up, highest score first.

    Boxes with NaN or infinity, as of a network that has diverged, are left out, which is said.

    Raises:
        ValueError: It is no detector's.
    """
    if prediction.boxes is None or prediction.scores is None or prediction.labels is None:
        raise ValueError(f'{prediction.item.source}: a prediction of {prediction.task} has no boxes')
    order = np.argsort(-prediction.scores, kind='stable')
    finite = np.isfinite(prediction.boxes).all(axis=1) & np.isfinite(prediction.scores)
    if not finite.all():
        name = first_line(_file_name(_key(prediction)))
        print_log(f'{name}: {np.count_nonzero(~finite)} boxes with NaN or infinity are left out', 'current', 30)
    order = order[finite[order] & (prediction.scores[order] >= score_thr)]
    masks = None if prediction.masks is None else [prediction.masks[index] for index in order]
    return Boxes(prediction.boxes[order], prediction.scores[order], prediction.labels[order], masks)


def _key(prediction: Prediction) -> Key:
    return Key(prediction.item.name, prediction.frame)


def coco_results(prediction: Prediction, score_thr: float = 0.0) -> dict[str, Any]:
    """The size and the boxes of an image or frame, as :func:`merge_coco` takes them."""
    from pycocotools import mask as rle

    found = kept_boxes(prediction, score_thr)
    boxes = []
    for index, (corners, score, label) in enumerate(zip(found.corners, found.scores, found.labels, strict=True)):
        # In the precision of Python, as in CocoMetric: differences of float32 would be rounded.
        x1, y1, x2, y2 = corners.tolist()
        box: dict[str, Any] = dict(label=int(label), score=float(score), bbox=[x1, y1, x2 - x1, y2 - y1])
        box['area'] = (x2 - x1) * (y2 - y1)
        if found.masks is not None:
            mask = found.masks[index]
            counts = mask['counts']
            counts = counts.decode('ascii') if isinstance(counts, bytes) else counts
            box['area'] = float(rle.area(mask))
            box['segmentation'] = dict(size=[int(length) for length in mask['size']], counts=counts)
        boxes.append(box)
    height, width = prediction.size
    return dict(height=int(height), width=int(width), boxes=boxes)


def _info() -> dict[str, str]:
    return dict(description=f'predictions by vheat_mm {__version__}')


def _file_name(key: Key) -> str:
    return key.name if key.frame is None else f'{key.name}/{key.frame:06d}'


def _images(lines: Iterable[tuple[Key, Any]], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for (key, results), number in zip(lines, numbers, strict=True):
        frame = {} if key.frame is None else dict(frame=key.frame)
        yield dict(id=number, file_name=_file_name(key), width=results['width'], height=results['height'], **frame)


def _annotations(
    lines: Iterable[tuple[Key, Any]], numbers: Sequence[int], categories: Mapping[int, int]
) -> Iterator[dict[str, Any]]:
    count = itertools.count(1)
    for (_, results), number in zip(lines, numbers, strict=True):
        for box in results['boxes']:
            category = categories[box.pop('label')]
            yield dict(id=next(count), image_id=number, category_id=category, iscrowd=0, **box)


def _unique_bases(names: Iterable[str]) -> dict[str, str]:
    """Names by their last parts, where these are unique."""
    names = list(names)
    bases = Counter(PurePosixPath(name).name for name in names)
    return {base: name for name in names if bases[base := PurePosixPath(name).name] == 1}
