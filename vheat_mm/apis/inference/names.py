"""Names of inputs, unique and relative; and those of their results, which fit any file system."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from mmengine.logging import print_log

from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.text import count, first_line

# Control characters, what Windows and its file systems forbid, and bytes of a name that are no UTF-8.
_UNSAFE = re.compile('[\x00-\x1f\x7f<>:"|?*\\\\\ud800-\udfff]')
_LONGEST = 200  # bytes of a part of a name: suffixes are appended, and file systems end at 255
_KEPT = {'.jpg', '.jpeg', '.png'}  # formats in which images are painted


def safe_name(name: str) -> str:
    """A relative POSIX name whose parts can be written in any file system.

    Args:
        name: Relative or not; parts such as ``..`` are dropped.
    """
    return '/'.join(_safe_part(part) for part in _relative(name).split('/'))


def _relative(name: str) -> str:
    return '/'.join(part for part in name.split('/') if part not in ('', '.', '..')) or '_'


def _safe_part(part: str) -> str:
    part = _UNSAFE.sub('_', part)
    part = re.sub(r'[. ]+$', '_', part)  # which Windows drops
    if len(part.encode()) <= _LONGEST:
        return part
    path = PurePosixPath(part)
    suffix = path.suffix if len(path.suffix) < 10 else ''
    digest = hashlib.sha256(part.encode()).hexdigest()[:8]
    return part.encode()[: _LONGEST - 20].decode(errors='ignore') + f'-{digest}{suffix}'


def distinct_names(places: Sequence[tuple[Hashable, Path, str]]) -> list[str]:
    """A name for each file: relative to its source where that is unique, else with the source's folders in front.

    Args:
        places: Of each file its source, the source's folder, and the name relative to that.
    """
    levels = {source: 0 for source, _, _ in places}
    folders = {source: folder.parts[1:] for source, folder, _ in places}
    while True:
        names = [
            _relative('/'.join([*folders[source][len(folders[source]) - levels[source] :], name]))
            for source, _, name in places
        ]
        sources: dict[str, set[Hashable]] = {}
        for (source, _, _), name in zip(places, names, strict=True):
            sources.setdefault(name.casefold(), set()).add(source)
        equal = (several for several in sources.values() if len({folders[source] for source in several}) > 1)
        clashing = {source for several in equal for source in several}
        higher = [source for source in clashing if levels[source] < len(folders[source])]
        if not higher:
            return number_equal(names, fold=str)
        for source in higher:
            levels[source] += 1


def number_equal(names: Iterable[str], fold: Callable[[str], str] = str.casefold) -> list[str]:
    """The names, with a number in those that equal an earlier one or a folder of another, by default but for case."""
    names = list(names)
    taken = {fold(str(parent)) for name in names for parent in PurePosixPath(name).parents}
    last_number: dict[str, int] = {}  # counting from 1 each time would be quadratic
    result = []
    for name in names:
        path, number, changed = PurePosixPath(name), last_number.get(fold(name), 1), name
        while fold(changed) in taken:
            number += 1
            changed = str(path.with_name(f'{path.stem}_{number}{path.suffix}'))
        last_number[fold(name)] = number
        taken.add(fold(changed))
        result.append(changed)
    return result


def output_names(items: Sequence[Item], kind: str) -> dict[int, str]:
    """Names of the results, by the index of the input; relative to the folder of that kind.

    They are safe, see :func:`safe_name`, and differ by more than case; how many are others than the inputs' is logged.

    Args:
        items: All inputs of the run.
        kind: 'painted': images keep a name that ends with .jpg, .jpeg or .png, others and videos get .png and .mp4
            appended. 'label_maps': PNG files with the image's name, which keeps its suffix where another image of the
            folder has the same name without it; of videos the name of the folder of their frames.
    """
    if kind == 'painted':
        return _safe_names(items, [_painted(item) for item in items], kind)
    if kind != 'label_maps':
        raise ValueError(f"kind={kind!r}, expected 'painted' or 'label_maps'")
    stems: dict[str, int] = {}
    for item in items:
        stem = str(PurePosixPath(item.name).with_suffix('')).casefold()
        stems[stem] = stems.get(stem, 0) + (not item.is_video)
    names = []
    for item in items:
        stem = str(PurePosixPath(item.name).with_suffix(''))
        one = stems[stem.casefold()] == 1
        names.append(item.name if item.is_video else f'{stem}.png' if one else f'{item.name}.png')
    return _safe_names(items, names, kind)


def _safe_names(items: Sequence[Item], wanted: Sequence[str], kind: str) -> dict[int, str]:
    names = number_equal(map(safe_name, wanted))
    changed = [(name, item.name) for item, name, one in zip(items, names, wanted, strict=True) if name != one]
    if changed:
        name, input_name = changed[0]
        print_log(
            f'under other names in {kind}: {count(len(changed), "file")}, such as {name} of {first_line(input_name)}, '
            'as not all file systems take all characters or tell upper and lower case apart',
            'current',
        )
    return dict(zip([item.index for item in items], names, strict=True))


def _painted(item: Item) -> str:
    suffix = PurePosixPath(item.name).suffix.lower()
    if item.is_video:
        return item.name if suffix == '.mp4' else f'{item.name}.mp4'
    return item.name if suffix in _KEPT else f'{item.name}.png'
