"""Results as lines that each process writes to a file of its own, and the reading of all of them in one order.

A line is a JSON object with the input's name and, of a video, the frame; a tab, which JSON never holds as such; and the
results as JSON. So an index needs no memory but a place in a file for each image, and no results are parsed for it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import atomic_file

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def report_full_disk(target: Path) -> Iterator[None]:
    """Turn the error of a full disk, or of a quota that is used up, into one that names the file and the space left.

    Raises:
        ToolError: There was no space for ``target``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.exists())).free / 2**20
        left = f'{free:.1f} MiB of the disk are free' if error.errno == errno.ENOSPC else 'your quota is used up'
        raise ToolError(
            f'{target} cannot be written: no space left in {target.parent} ({left}); what is complete has been kept: '
            'make room, then run again with --resume'
        ) from error


@contextlib.contextmanager
def result_file(target: Path) -> Iterator[IO[bytes]]:
    """Write a file, and its folders, so that it appears when it is complete.

    Raises:
        ToolError: The disk is full; ``target`` is as it was.
    """
    with report_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            yield file


class Key(NamedTuple):
    """Which image or frame a line is about."""

    name: str
    frame: int | None


class PartFile:
    """Lines of one process, each of them written whole or not at all.

    Args:
        path: A new file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with report_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, 'O_BINARY', 0)
            self._descriptor: int | None = os.open(path, flags, 0o666)
        self._end = 0

    def append(self, key: Key, results: Any) -> None:
        """Write the results of an image, so that they outlive this process.

        Raises:
            ToolError: The disk is full; the file ends with its last whole line.
        """
        if self._descriptor is None:
            raise ValueError(f'{self.path} is closed')
        head = dict(name=key.name) if key.frame is None else dict(name=key.name, frame=key.frame)
        line = f'{_dump(head)}\t{_dump(results)}\n'.encode('ascii')
        with report_full_disk(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:  # back to the end of the last whole line
                os.ftruncate(self._descriptor, self._end)
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
                raise
        self._end += len(line)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class PartWriter:
    """Writes the results of predictions as lines; nothing of one with an error.

    Args:
        path: The file of this process.
        results: What a line holds of a prediction; JSON must be able to.
    """

    def __init__(self, path: Path, results: Callable[[Prediction], Any]) -> None:
        self._file, self._results = PartFile(path), results

    def write(self, prediction: Prediction) -> None:
        """Write the line of an image or frame.

        Raises:
            ToolError: The disk is full.
        """
        if prediction.error is None:
            self._file.append(Key(prediction.item.name, prediction.frame), self._results(prediction))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Parts:
    """The lines of several processes and runs, in the order of the listing and of frames.

    Args:
        parts: Files of :class:`PartFile`, each with the inputs whose lines in it count. Of two lines about one image,
            the later one does; a missing file is empty.
    """

    def __init__(self, parts: Mapping[Path, Sequence[Item]]) -> None:
        self._paths = [path for path in parts if path.is_file()]
        found: dict[tuple[int, int], tuple[int, int]] = {}  # place and frame: number of the file, offset in it
        for number, path in enumerate(self._paths):
            places = {item.name: item.index for item in parts[path]}
            offset = 0
            with path.open('rb') as file:
                for line in file:
                    if line.endswith(b'\n') and (key := _read_key(line)).name in places:
                        found[places[key.name], key.frame or 0] = (number, offset)
                    offset += len(line)
        self._order = [found[place] for place in sorted(found)]

    def __len__(self) -> int:
        return len(self._order)

    def keys(self) -> Iterator[Key]:
        """Which images the lines are about."""
        for line in self._lines():
            yield _read_key(line)

    def __iter__(self) -> Iterator[tuple[Key, Any]]:
        for line in self._lines():
            yield _read_key(line), json.loads(line.partition(b'\t')[2])

    def _lines(self) -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open('rb')) for path in self._paths]
            for number, offset in self._order:
                files[number].seek(offset)
                yield files[number].readline()


def _read_key(line: bytes) -> Key:
    head = json.loads(line.partition(b'\t')[0])
    return Key(head['name'], head.get('frame'))


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(',', ':'))  # in ASCII: names of files need not be valid Unicode
