"""What a run reads: files, folders, globs, lists of paths and addresses, each file once and under a name of its own."""

from __future__ import annotations

import functools
import glob
import importlib.util
import logging
import os
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.logging import print_log

from vheat_mm.apis.inference.names import distinct_names
from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.config_place import did_you_mean
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import expand_user, read_regular
from vheat_mm.utils.text import count, first_line, is_address, some_of

# fmt: off
IMAGES = (
    '.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.avif', '.jp2', '.ppm', '.pgm', '.pbm', '.pnm',
    '.jpe', '.jfif', '.dib',
)
# fmt: on
VIDEOS = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
# Of photographs that OpenCV does not decode; see reading.py for what is said of them.
PHOTOGRAPHS = ('.heic', '.heif', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.raf', '.orf', '.rw2')
_LONGEST_LIST = 1 << 28  # bytes


class _Found(NamedTuple):
    """A file of a source: path or address, the folder its name is relative to, that name."""

    path: str
    folder: Path
    name: str


def list_items(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    recursive: bool = False,
    exclude: str | os.PathLike | None = None,
    keep_all: bool = False,
) -> list[Item]:
    """List the inputs of a run, in the order of the sources; a folder's in alphabetical order.

    What is not read is logged: by its suffix, because it is hidden, given twice or below ``exclude``. The path of an
    http(s) address is the address: :func:`~vheat_mm.apis.inference.reading.read` downloads it.

    Args:
        sources: Files of any suffix; folders, whose images and videos are taken by suffix; globs, also with ``**``;
            ``.txt`` files with a path or address a line; http(s) addresses.
        recursive: Also the folders within folders.
        exclude: The output folder.
        keep_all: Files that are given twice are listed twice, and of several sources one that does not exist is
            listed, too: so that results belong to the entries of a list of files.

    Raises:
        ToolError: A source does not exist, has no image or video, or is the output folder or inside it; videos need
            PyAV, which is not installed.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not several:
        raise ToolError('no source is given: name images, folders, globs, videos, http(s) addresses, or .txt lists')
    is_list = keep_all and not isinstance(sources, str | os.PathLike)
    listing = _Listing(recursive, None if exclude is None else Path(os.path.realpath(exclude)), is_list)
    found: list[tuple[int, str, _Found]] = []
    seen: set[str] = set()
    again = []
    real_folder = functools.lru_cache(os.path.realpath)
    for number, source in enumerate(os.fspath(source) for source in several):
        for file in listing.files_of(source):
            key = _identity(file.path, real_folder)
            if key in seen and not keep_all:
                again.append(file.path)
                continue
            seen.add(key)
            found.append((number, source, file))
    if again:
        print_log(f'given more than once and read once: {count(len(again), "file")}, {some_of(again, 3)}', 'current')
    names = distinct_names([(number, file.folder, file.name) for number, _, file in found])
    items = []
    for index, ((_, source, file), name) in enumerate(zip(found, names, strict=True)):
        video = _suffix(file.name) in VIDEOS
        items.append(Item(file.path, name, index, source, video))
    videos = [item.path for item in items if item.is_video]
    if videos and importlib.util.find_spec('av') is None:
        raise ToolError(f"reading videos such as {videos[0]!r} needs PyAV: pip install 'vheat_mm[predict]'")
    return items


def _identity(path: str, real_folder: Callable[[str], str]) -> str:
    """The same for one file by several paths; not for a link beside it, which has another name."""
    if is_address(path):
        return path
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 (faster than Path, for each of many files)
    return f'{real_folder(folder)}/{name}'


def _absolute(path: str | Path) -> Path:
    """Without ``..``, and with links as they are: a link's name is that of its input."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (of an address, too)


class _Listing:
    """Finds the files of sources and says what is left out."""

    def __init__(self, recursive: bool, exclude: Path | None, keep_missing: bool) -> None:
        self.recursive, self.exclude, self.keep_missing = recursive, exclude, keep_missing

    def files_of(self, source: str) -> list[_Found]:
        """The files of one source; raises ToolError if there are none."""
        if is_address(source):
            return [_of_address(source)]
        if not source.strip() or '\0' in source:
            raise ToolError(f"the source {source!r} is no path: give one, such as '.' for the working folder")
        path = expand_user(source)
        if os.path.lexists(path):
            self._refuse_output(path, source)
            if path.is_dir():
                return self._of_folder(path, source)
            if _suffix(path.name) == '.txt':
                return _of_list(path, source)
            return [_Found(str(path), _absolute(path).parent, _absolute(path).name)]
        if glob.has_magic(source):
            return self._of_glob(str(path), source)
        if self.keep_missing and '://' not in source:
            return [_Found(str(path), _absolute(path).parent, _absolute(path).name)]
        raise ToolError(f'there is no {source!r}{_hint(path, source)} (working directory {Path.cwd()})')

    def _refuse_output(self, path: Path, source: str) -> None:
        real = Path(os.path.realpath(path))
        if self.exclude is None or not (real == self.exclude or self.exclude in real.parents):
            return
        where = 'is' if real == self.exclude else 'lies in'
        raise ToolError(f'the source {source!r} {where} the output folder {str(self.exclude)!r}: give another one')

    def _of_folder(self, path: Path, source: str) -> list[_Found]:
        skipped: Counter[str] = Counter()
        files = list(self._walk(path, self.recursive, skipped))
        folders = skipped.pop('folders', 0)
        if not files:
            deeper = (
                f'; {count(folders, "folder")} in it would be read with --recursive'
                if folders and not self.recursive
                else ''
            )
            others = f'; it holds {_counts(skipped)}' if skipped else ''
            raise ToolError(
                f'no image or video in the folder {source!r}{others}{deeper}; looked for {" ".join(IMAGES + VIDEOS)}'
            )
        if folders and not self.recursive:
            print_log(f'{source}: {count(folders, "folder")} in it not read (--recursive)', 'current')
        self._say_skipped(source, skipped)
        return [_found(file, _absolute(path)) for file in files]

    def _walk(self, path: Path, recursive: bool, skipped: Counter[str]) -> Iterator[str]:
        """Files below a folder in alphabetical order; counts what is left out."""

        def report(error: OSError) -> None:
            if error.filename == str(path):
                raise ToolError(f'cannot read the folder {error.filename!r}: {error.strerror}') from error
            print_log(f'cannot read the folder {error.filename!r}: {error.strerror}', 'current', logging.WARNING)

        visited = {os.path.realpath(path)}
        for folder, subfolders, names in os.walk(path, followlinks=True, onerror=report):
            kept = []
            for name in sorted(subfolders):
                real = os.path.realpath(os.path.join(folder, name))  # noqa: PTH118 (faster for large folders)
                if self.exclude is not None and Path(real) == self.exclude:
                    print_log(f'{os.path.join(folder, name)!r} is the output folder and not read', 'current')  # noqa: PTH118
                elif name.startswith('.'):
                    skipped['hidden'] += 1
                elif not recursive:
                    skipped['folders'] += 1
                elif real in visited:
                    skipped['links to folders that are read already'] += 1
                else:
                    visited.add(real)
                    kept.append(name)
            subfolders[:] = kept
            for name in sorted(names):
                if self._takes(name, skipped):
                    yield os.path.join(folder, name)  # noqa: PTH118

    @staticmethod
    def _takes(name: str, skipped: Counter[str]) -> bool:
        suffix = _suffix(name)
        if name.startswith('.'):
            skipped['hidden'] += 1
        elif suffix not in IMAGES and suffix not in VIDEOS:
            skipped[first_line(suffix or 'without a suffix', 20)] += 1
        else:
            return True
        return False

    @staticmethod
    def _say_skipped(source: str, skipped: Counter[str]) -> None:
        if not skipped:
            return
        raw = any(suffix in PHOTOGRAPHS for suffix in skipped)
        hint = '; convert HEIC and raw photographs to JPEG or PNG first' if raw else ''
        print_log(f'{source}: skipped {_counts(skipped)}{hint}', 'current', logging.WARNING if raw else logging.INFO)

    def _of_glob(self, pattern: str, source: str) -> list[_Found]:
        """As if the shell had replaced the glob, but names begin after the last folder without a wildcard."""
        root = Path(pattern)
        while glob.has_magic(str(root)):
            root = root.parent
        found: list[str] = []
        skipped: Counter[str] = Counter()
        for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 (does not follow links, is not sorted)
            real = Path(os.path.realpath(match))
            if self.exclude is not None and (real == self.exclude or self.exclude in real.parents):
                skipped['in the output folder'] += 1
            elif not Path(match).is_dir():
                found += [match] if self._takes(os.path.basename(match), skipped) else []  # noqa: PTH119
            elif '**' not in pattern:  # which matches what is in the folders by itself
                found += self._walk(Path(match), self.recursive, skipped)
        skipped.pop('folders', 0)
        if not found:
            others = f', only {_counts(skipped)}' if skipped else ''
            raise ToolError(f'the glob {source!r} matches no image or video{others} (working directory {Path.cwd()})')
        self._say_skipped(source, skipped)
        return [_found(file, _absolute(root)) for file in found]


def _found(file: str, root: Path) -> _Found:
    return _Found(file, root, os.path.relpath(os.path.abspath(file), root).replace(os.sep, '/'))  # noqa: PTH100


def _counts(skipped: Counter[str]) -> str:
    return some_of([f'{kind} ({count})' for kind, count in skipped.most_common()])


def _hint(path: Path, source: str) -> str:
    if '://' in source:
        return ': only http:// and https:// addresses are read'
    if '\\' in source and os.sep == '/':
        return '; parts of a path are separated by / here, not by \\'
    try:
        known = os.listdir(path.parent)  # noqa: PTH208
    except OSError:
        return f'; there is no folder {str(path.parent)!r}, either' if not path.parent.exists() else ''
    close = did_you_mean(path.name, known)
    return close or '; names with blanks or special characters need quotes in the shell'


def _of_address(address: str) -> _Found:
    """Named after the last part of its path."""
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname
    except ValueError as error:
        raise ToolError(f'{address!r} is no valid address: {error}') from error
    if not host:
        raise ToolError(f'{address!r} is no valid address: it has no host')
    name = urllib.parse.unquote(parts.path, errors='replace').rstrip('/').rsplit('/', 1)[-1]
    return _Found(address, Path('/') / host, name or host)


def _of_list(path: Path, source: str) -> list[_Found]:
    """Paths and addresses of a text file; of those that do not exist, reading says so.

    Raises:
        ToolError: It is no text, or none of its lines is an existing file.
    """
    try:
        text = read_regular(path, _LONGEST_LIST).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ToolError(
            f'{source!r} is no text in UTF-8 ({error.reason}): a .txt source lists a path a line'
        ) from error
    if '\0' in text:
        raise ToolError(f'{source!r} is no text: it holds null bytes; a .txt source lists a path a line')
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith('#')]
    if not lines:
        raise ToolError(f'{source!r} lists no paths: write one a line')
    found = [line if is_address(line) else _beside(line, path.parent) for line in lines]
    files = [file for file in found if not is_address(file)]
    if len(files) == len(found) and not any(map(os.path.isfile, files)):
        raise ToolError(
            f'{source!r} is no list of files: none of its {len(lines)} lines is one, such as {first_line(lines[0])!r}; '
            f'paths are relative to {str(_absolute(path).parent)!r} or the working directory {Path.cwd()}'
        )
    folders = {_absolute(file).parent for file in files}
    root = _absolute(path).parent
    if any(root != folder and root not in folder.parents for folder in folders):
        root = Path(os.path.commonpath(folders))
    # One folder for all: names of a source are told apart by numbers only.
    return [_of_address(file)._replace(folder=root) if is_address(file) else _found(file, root) for file in found]


def _beside(line: str, folder: Path) -> str:
    """A line's path: relative to the list, or to the working directory where only that exists."""
    path = expand_user(line)
    beside = folder / path
    return str(path if os.path.lexists(path) and not os.path.lexists(beside) else beside)
