"""The start of a training: whether it continues a run, from which checkpoint, and under which id."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
from pathlib import Path

from mmengine.dist import all_gather_object, broadcast_object_list, get_world_size, is_main_process

from vheat_mm.checkpoint.resume import Candidate, Scan, names_of, read_place
from vheat_mm.checkpoint.run_folder import (
    LAST,
    RunRecord,
    is_inside,
    lock,
    not_readable,
    read_record,
    read_small,
    release,
    stale_parts,
)
from vheat_mm.utils.errors import CheckpointError, ToolError

LAUNCH = 'VHEAT_LAUNCH_ID'  # drawn by tools/dist_run.py; restarted processes have that of the first ones
_SECONDS_TO_END = 30  # how long a restarted process waits for the end of the one before


def lock_work_dir(work_dir: str | Path) -> list[str]:
    """Lock a work dir before anything is written into it; arguments and errors as :func:`run_folder.lock`."""
    record, _ = read_record(Path(work_dir))
    again = record is not None and _restarted() and _launch_id() in record.launches
    return lock(Path(work_dir), record.id if record else None, _SECONDS_TO_END if again else 0)


@dataclasses.dataclass
class Start:
    """How a training begins.

    Attributes:
        record: Its run.
        path: The checkpoint to resume from.
        place: What that checkpoint says about itself.
        notes: Lines for the log.
        error: Why it cannot begin.
    """

    record: RunRecord = dataclasses.field(default_factory=RunRecord)
    path: str | None = None
    place: Candidate | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    error: Exception | None = None


class Run:
    """A training in its folder. All processes create one; rank 0 chooses, locks, and writes ``run.json``.

    Args:
        work_dir: Folder of the run.
        folder: Folder of its checkpoints, which may be a remote address.
        template: Their names, with ``{}`` for a number.
    """

    def __init__(self, work_dir: str, folder: str, template: str) -> None:
        self.work_dir, self.folder, self.template = Path(work_dir), folder, template
        self.remote = '://' in folder
        self.record = RunRecord()
        self.started = False

    # --- the start

    def begin(self, resume: bool, path: str | None, loaded: bool = False) -> Start:
        """Begin a training, in all processes together.

        Args:
            resume: Whether to resume. Processes that have been restarted resume anyway.
            path: From this checkpoint; ``None`` for the run's newest one.
            loaded: Nothing can be resumed any more, the runner has loaded a checkpoint.

        Raises:
            ToolError: Another process trains in this folder.
            CheckpointError: There is no checkpoint to resume from where there must be one; processes see different
                files.
        """
        launches = sorted({launch for launch in all_gather_object(_launch_id()) if launch})
        starts = [Start()]
        if is_main_process():
            try:
                starts = [self._begin(resume, path, launches, loaded)]
            except (CheckpointError, ToolError, OSError) as error:
                starts = [Start(error=error)]
        broadcast_object_list(starts)
        start = starts[0]
        if start.error is not None:
            raise start.error
        if start.path is None and start.place is not None:
            start.path = self.join(start.place.name)  # each machine reads its own work dir
        self._compare(start)
        self.record, self.started = start.record, True
        return start

    def _begin(self, resume: bool, path: str | None, launches: list[str], loaded: bool) -> Start:
        record, notes = read_record(self.work_dir)
        again = record is not None and not loaded and _restarted() and bool(set(launches) & set(record.launches))
        notes += self.lock(record.id if record else None, _SECONDS_TO_END if again else 0)
        scan = Scan(self.work_dir, Path(self.folder), self.template)
        if again and record is not None:
            if record.saved or scan.of_run(record.id):
                resume, path = True, None
            else:
                how = f'from {path}' if resume and path else 'from the newest checkpoint' if resume else 'anew'
                notes.append(f'restarted before the first checkpoint: this training begins as the first time, {how}')
        place = chosen = None
        if resume and path is not None:
            chosen, place = self._newest(scan, record, path), read_place(path, path)
            if place is None:
                raise CheckpointError(
                    f'cannot resume from {path!r}: it holds weights but no training state; to start a new training '
                    'from these weights, drop --resume and pass --cfg-options load_from=PATH'
                )
        elif resume:
            chosen, more = self._remote_choice(record) if self.remote else scan.choose(record)
            place, notes = chosen, notes + more
            if chosen is None and again and record is not None and record.saved:
                raise CheckpointError(f'the restarted run {record.id} finds none of its checkpoints in {self.folder!r}')
            if chosen is None:  # no error: jobs may use --resume at the first start, too
                notes.append(f'no checkpoint to resume from in {self.folder}: training starts from the beginning')
        self.record = self._continued(scan, record, chosen) if chosen else (record or RunRecord()).next_run()
        self.record.launches = launches
        self.lock(self.record.id)
        self.record.write(self.work_dir)
        self._remove_parts(notes)
        return Start(self.record, path if resume else None, place, notes)

    def _newest(self, scan: Scan, record: RunRecord | None, path: str) -> Candidate | None:
        """The run's newest checkpoint if ``path`` is that file; from any other one, another run begins."""
        if self.remote or '://' in path or not Path(path).is_file():
            return None
        try:
            newest, _ = scan.choose(record)
        except CheckpointError:
            return None
        same = newest is not None and Path(self.join(newest.name)).samefile(path)
        return newest if same else None

    def _remote_choice(self, record: RunRecord | None) -> tuple[Candidate | None, list[str]]:
        """The name in ``last_checkpoint``: a remote storage cannot be listed."""
        name = os.fsdecode(read_small(self.work_dir / LAST) or b'').strip().rsplit('/', 1)[-1]
        known = names_of(self.template).fullmatch(name) and (record is None or not record.saved or name in record.names)
        return (Candidate(name, None, -1, -1), []) if known else (None, [])

    def _continued(self, scan: Scan, record: RunRecord | None, chosen: Candidate) -> RunRecord:
        """The record of the run that goes on from ``chosen``."""
        old = record or RunRecord()
        names = [*old.names, *(candidate.name for candidate in scan.accepted(record)), chosen.name]
        if chosen.run_id is None:
            result = dataclasses.replace(old.next_run(), names=names)
        else:
            ended = old.ended if chosen.run_id == old.id else None
            result = RunRecord(id=chosen.run_id, saved=True, ended=ended, names=names)
        result.names = list(dict.fromkeys(result.names))
        return result

    def _compare(self, start: Start) -> None:
        """Raise CheckpointError if processes would resume from different checkpoints."""
        if get_world_size() == 1 or start.path is None or '://' in start.path:
            return
        try:
            here = read_place(start.path, '') if Path(start.path).is_file() else None
        except CheckpointError:
            here = None
        found = f'epoch {here.epoch}, iteration {here.iteration}, run {here.run_id}' if here else 'no such checkpoint'
        places = [f'{host}: {what}' for host, what in all_gather_object((socket.gethostname(), found))]
        if len({place.split(': ', 1)[1] for place in places}) > 1:
            raise CheckpointError(
                f'processes would resume from different files {start.path!r}: {"; ".join(dict.fromkeys(places))}. '
                f'work_dir {str(self.work_dir)!r} must be the same folder on all machines'
            )

    def lock(self, run_id: str | None, seconds: float = 0) -> list[str]:
        """Lock the work dir and the folder of the checkpoints; see :func:`run_folder.lock`."""
        notes = lock(self.work_dir, run_id, seconds)
        if not self.remote and Path(self.folder).resolve() != self.work_dir.resolve():
            notes += lock(Path(self.folder), run_id, seconds)
        return list(dict.fromkeys(notes))

    def end(self, iteration: int) -> None:
        """Note that the training is complete, and release the locks."""
        self.record.ended = iteration
        with contextlib.suppress(OSError):
            self._write()
        release(self.work_dir)
        if not self.remote:
            release(Path(self.folder))

    def _remove_parts(self, notes: list[str]) -> None:
        own = [re.escape(name) for name in self.record.names]
        pattern = re.compile('|'.join([names_of(self.template).pattern, r'best_.*\.\w+', *own]))
        for folder in {self.work_dir, *([] if self.remote else [Path(self.folder)])}:
            for part in stale_parts(folder, pattern):
                part.unlink(missing_ok=True)
                notes.append(f'{part} removed: temporary file of a killed process')

    # --- its files

    def join(self, name: str) -> str:
        """Path of a checkpoint."""
        return f'{self.folder.rstrip("/")}/{name}'

    def name_of(self, path: object) -> str | None:
        """Name of a checkpoint of this folder that a path from inside a checkpoint may mean.

        ``None`` if there is none that a run of this folder wrote.
        """
        if not isinstance(path, str):
            return None
        names = [name for name in self.record.names if path == name or path.endswith(f'/{name}')]
        if names or self.remote:
            return max(names, key=len, default=None)
        name = path.rsplit('/', 1)[-1]
        if is_inside(name) and not_readable(Path(self.folder), name) is None:
            with contextlib.suppress(CheckpointError):
                place = read_place(self.join(name), name)
                if place is not None and place.run_id == self.record.id:  # run.json was lost
                    self.record.names.append(name)
                    return name
        return None

    def will_write(self, name: str) -> None:
        """Note the name of a checkpoint before it is written: only files with such names are removed later.

        Raises:
            OSError: ``run.json`` cannot be written.
        """
        if name not in self.record.names and is_inside(name):
            self.record.names.append(name)
            self._write()

    def has_written(self) -> None:
        """Note that the run has a checkpoint of its own. Raises OSError."""
        if not self.record.saved:
            self.record.saved, self.record.before = True, None
            self._write()

    def has_removed(self, name: str) -> None:
        """Forget a name; ``run.json`` is written with the next one."""
        self.record.names.remove(name)

    def may_remove(self, name: str) -> bool:
        """Whether a run of this folder wrote that file, and it is no link, folder, pipe or device."""
        if name not in self.record.names:
            return False
        if self.remote:
            return True
        path = Path(self.join(name))
        return not path.is_symlink() and path.is_file() and not_readable(Path(self.folder), name) is None

    def _write(self) -> None:
        if is_main_process():
            self.record.write(self.work_dir)


def _launch_id() -> str | None:
    """What started this process and would restart it, ``None`` for a process started alone."""
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    if 'TORCHELASTIC_RESTART_COUNT' in os.environ:  # torchrun without tools/dist_run.py
        return f'{socket.gethostname()}/{os.getppid()}/{os.environ.get("TORCHELASTIC_RUN_ID")}'
    return None


def _restarted() -> bool:
    """Whether this process may have been restarted by its launcher."""
    return LAUNCH in os.environ or os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
