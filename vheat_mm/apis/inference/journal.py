"""What a run has done so far, below its output folder, so that another one can go on after it.

``.predict/settings.json`` holds what the results depend on. Each process of each run appends to files of its own, which
bear the numbers of both, such as ``000001-000000.journal`` and ``000001-000000.coco``: a line of the journal for each
input, once all of its results are written, so the newest line about an input says which files hold its results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vheat_mm.apis.inference.parts import Key, PartFile, report_full_disk, result_file
from vheat_mm.apis.inference.types import Item
from vheat_mm.checkpoint.io import files_of, find_checkpoint
from vheat_mm.checkpoint.run_folder import lock
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import PARTIAL
from vheat_mm.utils.text import count, first_line, some_of

FOLDER = '.predict'
_SETTINGS, _JOURNAL = 'settings.json', '.journal'


class Stamp(NamedTuple):
    """By which a changed file is known: its bytes, and its time of change in nanoseconds."""

    size: int
    changed: int


def stamp(path: str) -> Stamp:
    """The stamp of a file; of one that is missing, a stamp that no file has."""
    with contextlib.suppress(OSError, ValueError):
        found = Path(path).stat()
        return Stamp(found.st_size, found.st_mtime_ns)
    return Stamp(-1, -1)


class Done(NamedTuple):
    """An input whose results are written.

    Attributes:
        stamp: Of its file before it was read.
        error: Why it, or the rest of a video, could not be predicted.
        images: Number of images or frames that were predicted.
        part: Name of the files that hold its results, without a suffix.
        boxes: Number of detections in them.
    """

    stamp: Stamp
    error: str | None
    images: int
    part: str
    boxes: int = 0

    @property
    def run(self) -> int:
        """Number of the run that has done it."""
        return int(self.part.split('-')[0])


class Journal:
    """What one process of one run has done.

    Args:
        folder: Output folder.
        part: From :func:`part_name`.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self._file = PartFile(folder / FOLDER / f'{part}{_JOURNAL}')

    def write(self, item: Item, stamp: Stamp, error: str | None, images: int, boxes: int = 0) -> None:
        """Note that all results of an input are written.

        Raises:
            ToolError: The disk is full.
        """
        self._file.append(Key(item.name, None), [*stamp, error, images, boxes])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def part_name(run: int, rank: int) -> str:
    """Name of the files of a process; a later run's is greater."""
    return f'{run:06d}-{rank:06d}'


def read_journals(folder: Path) -> dict[str, Done]:
    """What all runs so far have done, by the names of the inputs; incomplete lines are left out."""
    found = {}
    for path in sorted((folder / FOLDER).glob(f'*{_JOURNAL}')):
        with path.open('rb') as file:
            for line in file:
                if line.endswith(b'\n'):
                    head, _, rest = line.partition(b'\t')
                    size, changed, error, images, boxes = json.loads(rest)
                    found[json.loads(head)['name']] = Done(Stamp(size, changed), error, images, path.stem, boxes)
    return found


def next_run(folder: Path) -> int:
    """Number of a run that has no files yet, from 1."""
    numbers = [int(path.name.split('-')[0]) for path in (folder / FOLDER).glob('*-*') if re.match(r'\d+-', path.name)]
    return max(numbers, default=0) + 1


def parts_of(folder: Path, done: Mapping[str, Done], items: Iterable[Item], suffix: str) -> dict[Path, list[Item]]:
    """The files that hold the results of inputs, each with these inputs."""
    found: dict[Path, list[Item]] = {}
    for item in items:
        if item.name in done:
            found.setdefault(folder / FOLDER / f'{done[item.name].part}{suffix}', []).append(item)
    return found


def open_folder(folder: Path, resume: bool) -> list[str]:
    """Make the output folder, or enter that of an earlier run, and lock it; returns lines for the log.

    Raises:
        ToolError: It is a file, in use by another process, not empty without ``resume``, of no run with it, or cannot
            be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ToolError(f'--out {folder}: this is a file, expected a folder')
    begun = (folder / FOLDER / _SETTINGS).is_file()
    others = [path.name for path in folder.iterdir() if path.name != FOLDER] if folder.is_dir() else []
    if not resume and (begun or others):
        raise ToolError(
            f'--out {folder} is not empty ({some_of(sorted(others) or [FOLDER], 3)}): choose another folder'
            + (', or go on with the run in it: --resume' if begun else '')
        )
    if resume and not begun and others:
        raise ToolError(
            f'--resume: {folder} holds other files and no run of tools/predict.py ({some_of(sorted(others), 3)}): '
            'choose the --out of the run that is to go on'
        )
    try:
        with report_full_disk(folder / FOLDER):
            notes = lock(folder / FOLDER, option='--out')
    except OSError as error:
        raise ToolError(f'--out {folder} cannot be written: {error.strerror}; choose another folder') from error
    if resume and not begun:
        notes.append(f'--resume: no run in {folder} yet, a new one begins')
    left = sweep(folder)
    return notes + ([f'removed of a killed run: {count(left, "temporary file")}'] if left else [])


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Compare what results depend on with the earlier run of an output folder, or note it for later ones.

    Args:
        folder: Output folder.
        settings: Values that JSON can hold, nested or not; of options by these, such as '--tta'.

    Raises:
        ToolError: They differ; the message says where.
    """
    path, now = folder / FOLDER / _SETTINGS, _flatten(settings)
    if not path.is_file():
        with result_file(path) as file:
            file.write(json.dumps(now, indent=1).encode('ascii'))
        return
    try:
        then = {str(key): str(value) for key, value in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ToolError(f'--resume: {path} is damaged ({first_line(error)}): begin anew in another folder') from error
    differs = [key for key in dict.fromkeys((*then, *now)) if then.get(key) != now.get(key)]
    if differs:

        def value(key: str, settings: Mapping[str, str]) -> str:
            text = first_line(settings.get(key, 'None'), 60)
            return {'None': 'not set', 'False': 'not set', 'True': 'set'}.get(text, text)

        listed = [f'{key} was {value(key, then)} and is {value(key, now)}' for key in differs]
        raise ToolError(
            f'--resume: the results in {folder} were made with other settings: {some_of(listed, 3)}. '
            'Use the same ones, or another --out'
        )


def _flatten(node: Any, place: str = '') -> dict[str, str]:
    """The values of nested settings by their dotted places, as text."""
    if isinstance(node, Mapping):
        pairs: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list | tuple) and any(isinstance(value, Mapping | list | tuple) for value in node):
        pairs = enumerate(node)
    else:
        return {place: str(list(node) if isinstance(node, tuple) else node)}
    found: dict[str, str] = {}
    for key, value in pairs:
        found.update(_flatten(value, f'{place}.{key}' if place else str(key)))
    return found


def digest(checkpoint: str) -> str:
    """Of the content of all files of a checkpoint.

    Args:
        checkpoint: As :func:`~vheat_mm.checkpoint.io.read_checkpoint` takes it.

    Raises:
        CheckpointError: There is none.
    """
    sha = hashlib.sha256()
    for path in files_of(find_checkpoint(checkpoint)):
        with path.open('rb') as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def still_to_do(
    items: Sequence[Item], stamps: Sequence[Stamp], done: Mapping[str, Done]
) -> tuple[list[int], list[str]]:
    """What is left to predict after earlier runs.

    Returns:
        Places in ``items``, and the names of those of them that were predicted before and have changed since.
    """
    left, changed = [], []
    for place, item in enumerate(items):
        before = done.get(item.name)
        if before is not None and before.error is None and before.stamp == stamps[place]:
            continue
        left.append(place)
        if before is not None and before.error is None:
            changed.append(item.name)
    return left, changed


def sweep(folder: Path) -> int:
    """Remove the temporary files of processes that have ended, or of this one before it does; returns their number."""
    removed = 0
    for path in folder.rglob(f'.*{PARTIAL}'):
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed
