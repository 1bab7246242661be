"""A run's identity in its work dir: its id, the checkpoint that it began from, and a lock against a second start."""

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

from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import PARTIAL, atomic_file, read_regular

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE, LOCK_FILE = 'run.json', 'run.lock'
LAST = 'last_checkpoint'  # MMEngine's file with the path of the newest checkpoint
_LARGEST = 1 << 20  # bytes of a run file or of last_checkpoint
_held: dict[Path, IO[str]] = {}  # locks of this process; closing any handle of the file would release its lock


@dataclasses.dataclass
class RunRecord:
    """What ``run.json`` holds.

    Attributes:
        id: Of the run that was started last; each of its checkpoints bears it.
        saved: Whether that run has written a checkpoint.
        ended: Iteration at which that run was complete, with its last validation.
        before: Until it has saved, the id of the run whose checkpoints lie in the folder.
        origin: Path, id and iteration of the checkpoint of another run that it began from.
        launches: Ids of the launchers that started the processes of that run.
    """

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    saved: bool = False
    ended: int | None = None
    before: str | None = None
    origin: list | None = None
    launches: list[str] = dataclasses.field(default_factory=list)

    def next_run(self, origin: list | None = None) -> RunRecord:
        """The record of another run in the same folder."""
        return RunRecord(before=self.id if self.saved else self.before, origin=origin)

    def write(self, work_dir: Path) -> None:
        """Replace ``run.json``. Raises OSError."""
        with atomic_file(work_dir / RUN_FILE) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode())


def read_record(work_dir: Path) -> tuple[RunRecord | None, list[str]]:
    """Read ``run.json``; returns ``None`` where there is none, and a line for the log if it is damaged."""
    path = work_dir / RUN_FILE
    if not os.path.lexists(path):
        return None, []
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        record = RunRecord(**json.loads(read_small(path) or b''))
        origin, _, iteration = record.origin or ('', None, 0)
        numbers = [iteration, *([] if record.ended is None else [record.ended])]
        texts = [origin, *record.launches]
        ids = is_run_id(record.id) and (record.before is None or is_run_id(record.before))
        if ids and type(record.saved) is bool and {*map(type, texts)} == {str} and {*map(type, numbers)} == {int}:
            return record, []
    return None, [f'{str(path)!r} is damaged and not used']


def is_run_id(value: object) -> bool:
    """Whether a value can be the id of a run."""
    return isinstance(value, str) and re.fullmatch('[0-9a-f]{32}', value) is not None


def read_small(path: Path) -> bytes | None:
    """Content of a small regular file, ``None`` for anything else, also for a link."""
    with contextlib.suppress(OSError):
        return None if path.is_symlink() else read_regular(path, _LARGEST)
    return None


def lock(folder: Path, seconds: float = 0, option: str = '--work-dir') -> list[str]:
    """Lock a folder for this process until the process ends or :func:`release`; returns lines for the log.

    The lock belongs to the process: data-loader workers do not inherit it, and SIGKILL ends it.

    Args:
        folder: Created if it is missing.
        seconds: How long to wait for a process that is ending.
        option: Of the command line, to choose another folder; for the message.

    Raises:
        ToolError: Another process holds it.
        OSError: The folder cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    if fcntl is None:
        return ['this system has no file locks: do not start a second run in the same folder']
    if path in _held:
        return []
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), 'r+')
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            with file:
                holder = file.read(500).strip() or 'another process'
            raise ToolError(
                f'{str(folder)!r} is in use by {holder}: choose another {option}, or end that process first'
            ) from None
        except OSError as error:
            file.close()
            return [f'{str(path)!r} cannot be locked ({error.strerror}): do not start a second run in this folder']
    _held[path] = file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, started {time.strftime("%Y-%m-%d %H:%M:%S %z")}\n')
    file.flush()
    return []


def release(*folders: Path) -> None:
    """End this process's locks of these folders, or all of its locks."""
    for path in [folder.resolve() / LOCK_FILE for folder in folders] or list(_held):
        if file := _held.pop(path, None):
            file.close()


def remove_parts(folder: Path, names: re.Pattern) -> list[str]:
    """Remove temporary files of a process that was killed while it wrote them; returns lines for the log.

    Only the holder of the lock may do that.
    """
    notes = []
    for path in folder.glob(f'.*{PARTIAL}'):
        target = re.sub(r'\.[^.]*$', '', path.name[1 : -len(PARTIAL)])
        known = target in (LAST, RUN_FILE) or re.fullmatch(r'best_.*\.\w+', target) or names.fullmatch(target)
        if known and stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
            notes.append(f'{path} removed: temporary file of a killed process')
    return notes
