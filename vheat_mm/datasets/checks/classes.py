"""The class names of a config's data sets, compared with each other: where they differ, labels mean other classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from vheat_mm.datasets.checks.datasets import Part
from vheat_mm.datasets.checks.report import Finding
from vheat_mm.datasets.checks.voc import plain_name
from vheat_mm.utils.text import some_of

_OF_TOOLS = {'__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found', '__pycache__'}


def judge_classes(parts: list[Part]) -> Iterator[Finding]:
    """Compare the classes of data sets whose samples have been listed."""
    for part in parts:
        yield from _judge_own(part)
    named = [part for part in parts if part.classes]
    for first in [part for part in named if part.trains][:1]:
        for part in named:
            if hasattr(part.dataset, 'folder_to_idx') and part.classes == first.classes[: len(part.classes)]:
                if len(part.classes) < len(first.classes):  # labels are the same numbers
                    yield Finding('classes-fewer', part.source, _difference(part, first))
            elif part.classes != first.classes:
                yield Finding('classes-differ', part.source, _difference(part, first))
    numbered = [(part, numbers) for part in parts if (numbers := _numbers_of_folders(part))]
    for part, numbers in numbered:
        for name, label in numbers.items():
            other, expected = numbered[0][0], numbered[0][1].get(name, label)
            if label != expected and not (part.classes and other.classes):
                text = f'folder {name} is label {label} in {part.place}, and {expected} in {other.place}'
                yield Finding('classes-differ', part.source, text)
                break
    shifts = {
        part.place: part.dataset.reduce_zero_label for part in parts if hasattr(part.dataset, 'reduce_zero_label')
    }
    if len(set(shifts.values())) > 1:
        text = ', '.join(f'{place}: reduce_zero_label={value}' for place, value in shifts.items())
        yield Finding('classes-shifted', parts[0].source, text)


def _judge_own(part: Part) -> Iterator[Finding]:
    folders = sorted(getattr(part.dataset, 'folder_to_idx', ()))
    if hidden := [name for name in folders if name.startswith('.') or name in _OF_TOOLS]:
        yield Finding('class-folder-hidden', part.source, some_of(hidden))
    if sorted(part.classes) == folders != list(part.classes):
        text = f'folders are numbered in the order [{some_of(folders)}], metainfo.classes is '
        yield Finding('classes-order', part.source, f'{text}[{some_of(list(part.classes))}]')
    alike: dict[str, list[str]] = defaultdict(list)
    for name in part.classes:
        alike[plain_name(str(name))].append(name)
    if pairs := [names for names in alike.values() if len(names) > 1]:
        yield Finding('classes-alike', part.source, some_of([' and '.join(map(repr, names)) for names in pairs]))


def _difference(part: Part, first: Part) -> str:
    """Both lists, and what one has and the other lacks."""
    lists = [f'{each.place} has [{some_of(list(each.classes))}]' for each in (first, part)]
    notes = [f'lacks {some_of(lacking)}'] if (lacking := [x for x in first.classes if x not in part.classes]) else []
    notes += [f'adds {some_of(added)}'] if (added := [x for x in part.classes if x not in first.classes]) else []
    return f'{"; ".join(lists)}: the latter {" and ".join(notes) or "has another order"}'


def _numbers_of_folders(part: Part) -> dict[str, int]:
    """Folder of images -> label, where each folder holds one label and each label has one folder."""
    numbers = {name: next(iter(labels)) for name, labels in part.folders.items() if len(labels) == 1}
    is_clear = len(part.folders) == len(numbers) == len(set(numbers.values())) > 1
    return numbers if is_clear else {}
