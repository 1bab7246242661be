"""The labels of a COCO file, read at the start of each training: fast, and in the memory of one entry."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from vheat_mm.datasets.checks.coco import compare_classes
from vheat_mm.datasets.checks.json_stream import iterate
from vheat_mm.datasets.checks.kinds import KINDS
from vheat_mm.utils.errors import AnnotationError
from vheat_mm.utils.text import some_of

_NOT_FINITE = re.compile(r'\b(?:nan|inf)\b')


def check_coco_file(path: str, classes: tuple[str, ...]) -> None:
    """Check a COCO file's categories against the configured names, and its annotations against the categories.

    A file in a remote storage is not read.

    Raises:
        AnnotationError: They do not match, or the file holds NaN or infinity.
        MalformedJsonError: The file is no JSON object.
    """
    if not Path(path).is_file():
        return
    constants: list[str] = []  # NaN, Infinity and -Infinity, as far as they have been read
    not_finite = ''
    categories: dict[Any, str] = {}
    counts: Counter[Any] = Counter()
    first: dict[Any, str] = {}  # category id -> the first annotation that has it

    def keep(constant: str) -> float:
        constants.append(constant)
        return float(constant)

    for key, index, entry in iterate(path, parse_constant=keep):
        if key == 'categories' and index is not None:
            categories[entry['id']] = entry['name']
        elif key == 'annotations' and index is not None:
            category = entry.get('category_id')
            counts[category] += 1
            if category not in first:
                first[category] = f'annotation {entry.get("id")} of image {entry.get("image_id")}'
        if constants and not not_finite:
            not_finite = _locate(constants[0], key, index, entry)
    if not_finite:  # pycocotools runs out of memory on it, which kills the process
        raise AnnotationError(f'{path}: {not_finite}; {KINDS["box-not-finite"].remedy}')
    if mismatch := compare_classes(list(categories.values()), classes):
        kind, text = mismatch
        raise AnnotationError(f'{path}: {text}; {KINDS[kind].remedy}')
    if unknown := [category for category in counts if category not in categories]:
        raise AnnotationError(
            f'{path}: {first[unknown[0]]} has category_id={unknown[0]}, which is not among its categories '
            f'[{some_of(list(categories))}] ({sum(counts[category] for category in unknown)} such annotations); '
            f'{KINDS["category-unknown"].remedy}'
        )


def _locate(constant: str, key: str, index: int | None, entry: Any) -> str:
    if key != 'annotations' or not isinstance(entry, dict):
        return f'{key} holds {constant}' if index is None else f'{key}[{index}] holds {constant}'
    place = f'annotation {entry.get("id")} of image {entry.get("image_id")}'
    for field, value in entry.items():
        if found := _NOT_FINITE.search(repr(value)):
            return f'{place} has {found[0]} in its {field}'
    return f'{place} holds {constant}'
