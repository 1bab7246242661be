"""Classes as a table: a CSV file for spreadsheets, and JSON lines for programs.

Of a classifier, a row is an image or frame with its five most probable classes. Of a detector, a CSV row is a box, so
images without boxes have none, and a JSON line is an image with all of its boxes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vheat_mm.apis.inference.coco import kept_boxes
from vheat_mm.apis.inference.parts import Parts, result_file
from vheat_mm.apis.inference.types import Item, Prediction

TOP = 5
COLUMNS = {
    'classification': ['name', 'frame']
    + [f'{what}-{place}' for place in range(1, TOP + 1) for what in ('class', 'score')],
    'detection': ['name', 'frame', 'class', 'label', 'score', 'x1', 'y1', 'x2', 'y2'],
}


def best_classes(scores: np.ndarray) -> list[int]:
    """Numbers of the five most probable classes, without those of probability 0, which were not chosen."""
    return [label for label in np.argsort(-scores, kind='stable')[:TOP].tolist() if scores[label] > 0]


def table_entries(prediction: Prediction, classes: Sequence[str], score_thr: float = 0.0) -> Iterator[dict[str, Any]]:
    """The classes of a prediction, best first.

    Args:
        prediction: Of a classifier or detector.
        classes: The model's.
        score_thr: Boxes with lower scores are left out.

    Yields:
        ``class``, ``label`` (its number from 0), ``score`` to six places and, of a box, its corners ``x1, y1, x2, y2``
        in pixels to two.
    """
    if prediction.boxes is None:
        assert prediction.scores is not None
        for label in best_classes(prediction.scores):
            yield {'class': classes[label], 'label': label, 'score': round(float(prediction.scores[label]), 6)}
        return
    found = kept_boxes(prediction, score_thr)
    for corners, score, label in zip(found.corners.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        box = dict(zip(('x1', 'y1', 'x2', 'y2'), (round(value, 2) for value in corners), strict=True))
        yield {'class': classes[label], 'label': label, 'score': round(score, 6), **box}


def merge_table(parts: Mapping[Path, Sequence[Item]], task: str, target: Path) -> None:
    """Join the files of all processes and runs into one, in the order of the listing and of frames.

    Args:
        parts: Files of lists of :func:`table_entries`, each with the inputs whose lines in it count.
        task: 'classification' or 'detection'.
        target: The file to write: CSV of RFC 4180 in UTF-8 if its name ends with '.csv', else JSON lines, each with
            ``name``, of a video ``frame``, and ``classes`` or ``boxes``, see :func:`table_entries`.

    Raises:
        ToolError: The disk is full; ``target`` is as it was.
    """
    with result_file(target) as file:
        if target.suffix == '.csv':
            # Names of files that are not valid Unicode are written as they are.
            text = io.TextIOWrapper(file, 'utf-8', errors='surrogateescape', newline='', write_through=True)
            table = csv.DictWriter(text, COLUMNS[task], extrasaction='ignore')
            table.writeheader()
            table.writerows(_rows(Parts(parts), task))
            text.detach()
            return
        for key, found in Parts(parts):
            frame = {} if key.frame is None else dict(frame=key.frame)
            line = dict(name=key.name, **frame, **{'boxes' if task == 'detection' else 'classes': found})
            file.write(json.dumps(line).encode('ascii') + b'\n')


def _rows(lines: Parts, task: str) -> Iterator[dict[str, Any]]:
    """Rows of the CSV file."""
    for key, found in lines:
        if task == 'detection':
            yield from (dict(name=key.name, frame=key.frame, **entry) for entry in found)
            continue
        row: dict[str, Any] = dict(name=key.name, frame=key.frame)
        for place, entry in enumerate(found, 1):
            row.update({f'class-{place}': entry['class'], f'score-{place}': entry['score']})
        yield row
