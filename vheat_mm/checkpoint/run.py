"""The start of a training: whether it continues a run, from which checkpoint, and under which id."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, broadcast_object_list, get_world_size, is_main_process

from vheat_mm.checkpoint.resume import NO_STATE, Candidate, Scan, is_own_file, names_of, read_place
from vheat_mm.checkpoint.run_folder import RunRecord, lock, read_record, release, remove_parts
from vheat_mm.utils.errors import CheckpointError, ToolError

LAUNCH = 'VHEAT_LAUNCH_ID'  # drawn by tools/dist_run.py; restarted processes have that of the first ones
_SECONDS_TO_END = 30  # how long a restarted process waits for the end of the one before


def lock_work_dir(work_dir: str | Path) -> list[str]:
    """Lock a work dir before anything is written into it; returns and errors as :func:`run_folder.lock`."""
    record, _ = read_record(Path(work_dir))
    return lock(Path(work_dir), _SECONDS_TO_END if _is_restart(record, [_launch_id()]) else 0)


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

    def begin(
        self, resume: bool, path: str | None, loaded: bool = False
    ) -> tuple[str | None, Candidate | None, list[str]]:
        """Begin a training, in all processes together.

        Args:
            resume: Whether to resume. Processes that have been restarted resume anyway.
            path: From this checkpoint; ``None`` for the run's newest one.
            loaded: Nothing can be resumed any more, the runner has loaded a checkpoint.

        Returns:
            The checkpoint to resume from; what it says about itself, unless it is remote; and lines for the log.

        Raises:
            ToolError: Another process trains in this folder.
            CheckpointError: There is no checkpoint to resume from where there must be one; processes see different
                files.
        """
        launches = all_gather_object(_launch_id())
        chosen: list[Any] = [None]
        if is_main_process():
            try:
                chosen = [self._begin(resume, path, launches, loaded)]
            except (CheckpointError, ToolError, OSError) as error:
                chosen = [error]
        broadcast_object_list(chosen)
        if isinstance(chosen[0], Exception):
            raise chosen[0]
        self.record, path, place, notes = chosen[0]
        if place is not None:
            path = path or self.join(place.name)  # each machine reads its own work dir
        if path is not None and '://' not in path:
            self._compare(path)
        self.started = True
        return path, place, notes

    def _begin(
        self, resume: bool, path: str | None, launches: list[str | None], loaded: bool
    ) -> tuple[RunRecord, str | None, Candidate | None, list[str]]:
        record, notes = read_record(self.work_dir)
        restart = record if not loaded and _is_restart(record, launches) else None
        for folder in self._folders():
            notes += lock(folder, _SECONDS_TO_END if restart else 0)
        scan = Scan(self.work_dir, Path(self.folder), self.template)
        if restart and (restart.saved or scan.of_run(restart.id)):
            resume, path = True, None
        elif restart:
            how = f'from {path}' if resume and path else 'from the newest checkpoint' if resume else 'anew'
            notes.append(f'restarted before the first checkpoint: this training begins as the first time, {how}')
        place, new = None, (record or RunRecord()).next_run()
        if resume and path is not None:
            if '://' not in path:
                place = read_place(path, path)
                if place is None:
                    raise CheckpointError(
                        f'cannot resume from {path!r}: {NO_STATE}; to start a new training from its weights, drop '
                        '--resume and pass --cfg-options load_from=PATH'
                    )
                new = self._from_path(scan, record, path, place)
        elif resume:
            if not self.remote:
                place, more = scan.choose(record)
                notes += more
            elif names_of(self.template).fullmatch(scan.last):  # a remote storage cannot be listed
                place = Candidate(scan.last, None if record is None else record.id if record.saved else record.before)
            if place is None:  # no error: jobs may use --resume at the first start, too
                if restart and restart.saved:
                    raise CheckpointError(f'the restarted run {restart.id} finds no checkpoint in {self.folder!r}')
                notes.append(f'no checkpoint to resume from in {self.folder}: training starts from the beginning')
            elif record is not None and (place.run_id == record.id or place.as_origin() == record.origin):
                new = record
            elif place.run_id is not None:
                new = RunRecord(id=place.run_id, saved=True)
            else:
                new = new.next_run(origin=place.as_origin())
        new.launches = sorted({launch for launch in launches if launch})
        new.write(self.work_dir)
        for folder in self._folders():
            notes += remove_parts(folder, names_of(self.template))
        return new, path if resume else None, place, list(dict.fromkeys(notes))

    def _from_path(self, scan: Scan, record: RunRecord | None, path: str, place: Candidate) -> RunRecord:
        """The same run, if ``path`` is its newest checkpoint; from any other one, another run begins."""
        file, folder = Path(path).expanduser().resolve(), Path(self.folder).resolve()
        inside = not self.remote and file.is_relative_to(folder)
        newest = all(other.iteration <= place.iteration for other in scan.of_run(place.run_id))
        if inside and newest and place.run_id is not None and (record is None or place.run_id == record.id):
            return record or RunRecord(id=place.run_id, saved=True)
        name = file.relative_to(folder).as_posix() if inside else str(file)
        return (record or RunRecord()).next_run(origin=[name, place.run_id, place.iteration])

    def _compare(self, path: str) -> None:
        """Raise CheckpointError if processes would resume from different checkpoints."""
        if get_world_size() == 1:
            return
        found = 'no such checkpoint'
        with contextlib.suppress(CheckpointError):
            place = read_place(path, '')
            found = f'epoch {place.epoch}, iteration {place.iteration}, run {place.run_id}' if place else 'no state'
        places = all_gather_object((socket.gethostname(), found))
        if len({found for _, found in places}) > 1:
            shown = '; '.join(dict.fromkeys(f'{host}: {found}' for host, found in places))
            raise CheckpointError(
                f'processes would resume from different files {path!r}: {shown}. '
                f'work_dir {str(self.work_dir)!r} must be the same folder on all machines'
            )

    def end(self, iteration: int) -> None:
        """Note that the training is complete, and release the locks."""
        self.record.ended = iteration
        if is_main_process():
            with contextlib.suppress(OSError):
                self.record.write(self.work_dir)
        release(*self._folders())

    def _folders(self) -> list[Path]:
        return [self.work_dir] if self.remote else list(dict.fromkeys([self.work_dir, Path(self.folder)]))

    def join(self, name: str) -> str:
        """Path of a checkpoint; the one that the run began from may lie elsewhere."""
        return name if Path(name).is_absolute() else f'{self.folder.rstrip("/")}/{name}'

    def has_written(self) -> None:
        """Note that the run has a checkpoint of its own. Raises OSError."""
        if not self.record.saved:
            self.record.saved, self.record.before = True, None
            if is_main_process():
                self.record.write(self.work_dir)

    def wrote(self, name: str) -> bool:
        """Whether this run wrote that file: it bears its id, and is no link, folder, pipe or device.

        A remote file is not read for that: the run's own checkpoints are believed.
        """
        if self.remote:
            return name not in ('', '.', '..')
        with contextlib.suppress(CheckpointError, OSError):
            if is_own_file(Path(self.folder), name) and not Path(self.join(name)).is_symlink():
                place = read_place(self.join(name), name)
                return place is not None and place.run_id == self.record.id
        return False


def _launch_id() -> str | None:
    """What started this process and would restart it, ``None`` for a process started alone."""
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    if 'TORCHELASTIC_RESTART_COUNT' in os.environ:  # torchrun without tools/dist_run.py
        return f'{socket.gethostname()}/{os.getppid()}/{os.environ.get("TORCHELASTIC_RUN_ID")}'
    return None


def _is_restart(record: RunRecord | None, launches: list[str | None]) -> bool:
    """Whether the launcher that started the last run of the folder has started these processes, too."""
    maybe = LAUNCH in os.environ or os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
    return maybe and record is not None and any(launch in record.launches for launch in launches)
