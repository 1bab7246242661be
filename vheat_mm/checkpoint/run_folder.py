"""A run's identity in its work dir: an id, the names of the files that it wrote, and a lock against a second start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import stat
import time
import uuid
from pathlib import Path
from typing import IO

from vheat_mm.checkpoint.io import PARTIAL, atomic_file
from vheat_mm.utils.errors import ToolError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE, LOCK_FILE = 'run.json', 'run.lock'
LAST = 'last_checkpoint'  # MMEngine's file with the path of the newest checkpoint
_LARGEST = 1 << 22  # bytes of a run file or of last_checkpoint
_held: dict[Path, IO[str]] = {}  # locks of this process; closing any handle of the file would release its lock


@dataclasses.dataclass
class RunRecord:
    """What ``run.json`` holds.

    Attributes:
        id: Of the run that was started last; each of its checkpoints bears it.
        saved: Whether that run has written a checkpoint.
        ended: Iteration at which that run was complete, with its last validation.
        before: Until then, the id of the run whose checkpoints lie in the folder.
        launches: Ids of the launchers that started the processes of that run.
        names: Checkpoints that runs of this folder wrote, as paths relative to the folder of the checkpoints.
    """

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    saved: bool = False
    ended: int | None = None
    before: str | None = None
    launches: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)

    def next_run(self) -> RunRecord:
        """The record of another run in the same folder."""
        return RunRecord(before=self.id if self.saved else self.before, names=self.names)

    def write(self, work_dir: Path) -> None:
        """Replace ``run.json``. Raises OSError."""
        with atomic_file(work_dir / RUN_FILE) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode())


def read_record(work_dir: Path) -> tuple[RunRecord | None, list[str]]:
    """Read ``run.json``; returns ``None`` where there is none, and a line for the log if it is damaged."""
    text = read_small(work_dir / RUN_FILE)
    if text is None and not os.path.lexists(work_dir / RUN_FILE):
        return None, []
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        record = RunRecord(**json.loads(text or b''))
        ids = [record.id, *([] if record.before is None else [record.before])]
        texts = [*record.launches, *record.names]
        if (
            all(isinstance(text, str) for text in (*ids, *texts))
            and all(map(is_run_id, ids))
            and isinstance(record.saved, bool)
            and all(map(is_inside, record.names))
        ):
            return record, []
    return None, [f'{str(work_dir / RUN_FILE)!r} is damaged and not used']


def is_run_id(value: object) -> bool:
    """Whether a value can be the id of a run."""
    return isinstance(value, str) and re.fullmatch('[0-9a-f]{32}', value) is not None


def is_inside(name: str) -> bool:
    """Whether a relative path stays inside its folder."""
    parts = name.split('/')
    return '\0' not in name and not any(part in ('', '.', '..') for part in parts)


def read_small(path: Path) -> bytes | None:
    """Content of a small regular file, ``None`` for anything else."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST:
            return path.read_bytes()
    return None


def not_readable(folder: Path, name: str) -> str | None:
    """Why a file of the folder is not opened: it is a link that leaves the folder, a folder, a pipe or a device."""
    try:
        path = (folder / name).resolve(strict=True)
        if not stat.S_ISREG(path.stat().st_mode):
            return 'it is not a regular file'
        return (
            None if path.is_relative_to(folder.resolve()) else f'it is a link to {str(path)!r}, outside of the folder'
        )
    except (OSError, RuntimeError):  # RuntimeError: a link to itself, before Python 3.13
        return 'it is a link to nowhere'


def lock(folder: Path, run_id: str | None = None, seconds: float = 0) -> list[str]:
    """Lock a folder for this process until the process ends or :func:`release`; returns lines for the log.

    The lock belongs to the process: data-loader workers do not inherit it, and SIGKILL ends it.

    Args:
        folder: Created if it is missing.
        run_id: Written into the file, with host, process and time.
        seconds: How long to wait for a process that is ending.

    Raises:
        ToolError: Another process holds it.
        OSError: The folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    if fcntl is None:
        return ['this system has no file locks: do not start a second training in the same work dir']
    file, end = _held.get(path), time.monotonic() + seconds
    if file is None:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), 'r+')
    while path not in _held:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held[path] = file
        except (BlockingIOError, PermissionError):
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            with file:
                holder = file.read(500).strip() or 'another process'
            raise ToolError(
                f'{str(folder)!r} is in use by {holder}: choose another --work-dir, or end that process first'
            ) from None
        except OSError as error:
            file.close()
            return [f'{str(path)!r} cannot be locked ({error.strerror}): do not start a second training in this folder']
    file.seek(0)
    file.truncate()
    started = time.strftime('%Y-%m-%d %H:%M:%S %z')
    file.write(f'process {os.getpid()} on {socket.gethostname()}, started {started}, run {run_id or "not yet known"}\n')
    file.flush()
    return []


def release(folder: Path) -> None:
    """End this process's lock of the folder, if there is one."""
    if file := _held.pop(folder.resolve() / LOCK_FILE, None):
        file.close()


def release_all() -> None:
    """End all locks of this process, for a tool that is called within another program."""
    for path in list(_held):
        release(path.parent)


def stale_parts(folder: Path, names: re.Pattern) -> list[Path]:
    """Temporary files of a process that was killed while it wrote them; only the holder of the lock may remove them."""
    found = []
    for path in folder.glob(f'.*{PARTIAL}'):
        target = re.sub(r'\.[^.]*$', '', path.name[1 : -len(PARTIAL)])
        if (target in (LAST, RUN_FILE) or names.fullmatch(target)) and stat.S_ISREG(path.lstat().st_mode):
            found.append(path)
    return found
