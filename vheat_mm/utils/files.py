"""Files that are read from outside."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {stat.S_IFIFO: 'named pipe', stat.S_IFCHR: 'device', stat.S_IFBLK: 'device', stat.S_IFDIR: 'folder'}


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
