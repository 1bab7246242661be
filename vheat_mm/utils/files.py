"""Files that are read from outside, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

PARTIAL = '.part'  # suffix of files while they are written

_KINDS = {stat.S_IFIFO: 'named pipe', stat.S_IFCHR: 'device', stat.S_IFBLK: 'device', stat.S_IFDIR: 'folder'}


def expand_user(path: str) -> Path:
    """The path with ``~`` replaced, or as it is where that fails; ``Path.expanduser`` raises RuntimeError then."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Reading a named pipe may wait for ever, and reading a device such as ``/dev/zero`` may never end.

    Raises:
        OSError: It is none, or cannot be opened; ``filename`` is its path.
    """
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes. Windows has neither.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(descriptor, 'rb')
    os.close(descriptor)
    raise OSError(errno.EINVAL, f'a {_KINDS.get(kind, "special file")}, expected a regular file', str(path))


def read_regular(path: str | Path, limit: int | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        limit: Bytes that it may have; half of this machine's memory by default.

    Raises:
        OSError: As :func:`open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is None and hasattr(os, 'sysconf'):  # not on Windows
            limit = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f'a file of {size} bytes, more than {limit}', str(path))
        return file.read()


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``target`` after the block, or is removed if the block raises.

    A process that is killed meanwhile leaves the file behind, as ``.<target>.<random>.part`` in the same folder.
    """
    # Opened, not made by tempfile: the system then sets the usual mode, and no chmod is needed, which vfat refuses.
    part = target.with_name(f'.{target.name}.{secrets.token_hex(4)}{PARTIAL}')
    try:
        with part.open('xb+') as file:
            yield file
        replace_file(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def replace_file(part: Path, target: Path) -> None:
    """Write a file to the disk and rename it to ``target``, of the same folder."""
    with part.open('rb+') as file:
        _sync(file.fileno())
    _replace(part, target)
    _sync_folder(target.parent)


def _sync(descriptor: int) -> None:
    """Write a file to the disk; some network and user-space file systems cannot be told to."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES):
            raise


def _replace(part: Path, target: Path) -> None:
    """Rename; network file systems refuse it for a moment while another machine has the target open."""
    for delay in (0.1, 0.4, 1.0):
        try:
            part.replace(target)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EEXIST, errno.EAGAIN):
                raise
            time.sleep(delay)
        else:
            return
    part.replace(target)


def _sync_folder(folder: Path) -> None:
    """Write the rename to disk, where the system can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
