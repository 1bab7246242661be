"""The checkpoint that a training resumes from: the newest intact one of its run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.run_folder import LAST, RunRecord, is_run_id, read_record, read_small
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import check_content, open_file, verify_file
from vheat_mm.utils.errors import CheckpointError

INTERRUPTED = 'interrupted.pth'  # one name, so that repeated interruptions do not fill the disk
RUN_ID = 'vheat_run_id'  # in a checkpoint's meta
NO_STATE = 'it holds no usable training state (message_hub, and iter, epoch, seed in meta)'
_NAMES = rf'(epoch|iter)_\d+\.(pth|pt|ckpt)|{re.escape(INTERRUPTED)}'
_UNUSABLE = 'restore an intact copy, name another one with --resume PATH, or move {} away to start from scratch'


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint with training state.

    ``run_id`` is ``None`` for one that this package did not write; iteration and epoch are -1 where unknown.
    """

    name: str
    run_id: str | None = None
    iteration: int = -1
    epoch: int = -1
    seed: int | None = None

    def __str__(self) -> str:
        return f'{self.name} (epoch {self.epoch}, iteration {self.iteration}, run {self.run_id or "unknown"})'

    def as_origin(self) -> list:
        """What ``run.json`` of a run that begins here keeps."""
        return [self.name, self.run_id, self.iteration]


def find_newest(
    work_dir: str | Path, folder: str | Path | None = None, template: str | None = None
) -> tuple[str | None, list[str]]:
    """Find the newest checkpoint that training can resume from.

    MMEngine trusts the path in the file ``last_checkpoint``, whatever it is. Here only files of the folder count that
    bear the id of its run, the highest iteration first. Times and clocks do not matter.

    Args:
        work_dir: Folder of the run.
        folder: Folder of its checkpoints if that is another one.
        template: Their names, with ``{}`` for a number, beside ``epoch_N.pth``, ``iter_N.pth``, ``interrupted.pth``.

    Returns:
        Its path, or ``None`` if there is no checkpoint; and lines for the log.

    Raises:
        CheckpointError: Every checkpoint of the run is corrupt or gone; or they are of several unknown runs.
    """
    record, notes = read_record(Path(work_dir))
    scan = Scan(Path(work_dir), Path(folder or work_dir), template)
    found, more = scan.choose(record)
    return (None if found is None else str(scan.folder / found.name)), notes + more


def names_of(template: str | None) -> re.Pattern:
    """What checkpoints to resume from are called, as relative paths."""
    own = ''.join(
        re.escape(literal) + (r'\d+' if field is not None else '')
        for literal, field, _, _ in Formatter().parse(template or '')
    )
    return re.compile(f'{_NAMES}|{own}' if own else _NAMES)


class Scan:
    """The checkpoints of a folder.

    Attributes:
        candidates: Those with training state.
        last: The last part of the path in ``last_checkpoint``.
        pattern: Usual names of checkpoints.
        corrupt: Name to reason.
    """

    def __init__(self, work_dir: Path, folder: Path, template: str | None) -> None:
        self.folder, self.candidates, self.corrupt, self.notes = (
            folder,
            list[Candidate](),
            dict[str, str](),
            list[str](),
        )
        self.pattern = pattern = names_of(template)
        below = re.sub(r'\{[^}]*\}', '*', template or '*') if folder.is_dir() else '*'
        names = {path.relative_to(folder).as_posix() for path in (*folder.glob('*'), *folder.glob(below))}
        names = {name for name in names if pattern.fullmatch(name) or re.fullmatch(r'(?!best_|\.).*\.pth', name)}
        self.pointed, self.lost = self._pointer(work_dir / LAST, names, pattern)
        for name in sorted(names | ({self.pointed} if self.pointed else set())):
            usual = pattern.fullmatch(name) is not None or name == self.pointed
            if (folder / name).is_dir():  # DeepSpeed's format, which only its own loader reads
                continue
            if not is_own_file(folder, name):
                self.notes.append(f'{name} is not used: it is no regular file, or a link that leaves the folder')
                continue
            try:
                candidate = read_place(folder / name, name)
            except CheckpointError as error:
                if usual:
                    self.corrupt[name] = str(error)
                continue
            if candidate is not None and (usual or candidate.run_id is not None):
                self.candidates.append(candidate)

    def _pointer(self, path: Path, names: set[str], pattern: re.Pattern) -> tuple[str | None, bool]:
        """The name in ``last_checkpoint`` if such a file is in the folder; whether it names one that is gone."""
        text = os.fsdecode(read_small(path) or b'').rstrip('\n')
        self.last = last = text.rsplit('/', 1)[-1]
        if not os.path.lexists(path):
            return None, False
        if '\0' not in text and not last.startswith('.') and last and os.path.lexists(self.folder / last):
            names = names | {last}
        matches = [name for name in names if f'/{text}'.endswith(f'/{name}')]
        if matches:
            return max(matches, key=len), False
        self.notes.append(f'{LAST} is not used: {text[:200]!r} names no file of {str(self.folder)!r}')
        return None, pattern.fullmatch(last) is not None

    def choose(self, record: RunRecord | None) -> tuple[Candidate | None, list[str]]:
        """The newest intact checkpoint of the run, and lines for the log. Raises CheckpointError; see find_newest."""
        folder, notes = str(self.folder), list(self.notes)
        if self.pointed is not None and (self.folder / self.pointed).is_dir():
            return Candidate(self.pointed), notes
        accepted = self._accepted(record)
        if foreign := [str(candidate) for candidate in self.candidates if candidate not in accepted]:
            notes.append(f'checkpoints of other runs are passed over: {", ".join(foreign)}')
        if record is not None and record.before is not None and accepted and accepted[0].run_id == record.before:
            notes.append(f'run {record.id} has saved nothing: run {record.before}, from before, goes on')
        for candidate in (*sorted(accepted, key=self._order, reverse=True), *self._origin(record)):
            try:
                verify_file(self.folder / candidate.name)
            except CheckpointError as error:
                self.corrupt[candidate.name] = str(error)
                continue
            return candidate, notes + [f'left out: {reason}' for reason in self.corrupt.values()]
        if self.corrupt:
            raise CheckpointError(
                f'no intact checkpoint to resume from in {folder!r}: {"; ".join(self.corrupt.values())}. '
                f'{_UNUSABLE.format("these files").capitalize()}'
            )
        origin = record.origin[0] if record is not None and record.origin else None
        if record is not None and (record.saved or origin):
            what = 'saved checkpoints there' if record.saved else f'began from {origin!r}'
            raise CheckpointError(
                f'no checkpoint to resume from in {folder!r}, but run {record.id} {what}: '
                f'{_UNUSABLE.format("run.json")}'
            )
        if self.lost and not self.candidates:
            raise CheckpointError(
                f'{self.notes[-1]}, and there is no other checkpoint: restore it, name another with --resume PATH, or '
                f'remove {LAST} to start from scratch'
            )
        return None, notes

    def of_run(self, run_id: str | None) -> list[Candidate]:
        """Checkpoints with that id."""
        return [candidate for candidate in self.candidates if candidate.run_id == run_id]

    def _accepted(self, record: RunRecord | None) -> list[Candidate]:
        """The checkpoints of this folder's run. Raises CheckpointError if that run is unknown."""
        if record is not None:
            own = self.of_run(record.id)
            if own or record.saved or record.origin:
                return own
            if record.before is not None:
                return self.of_run(record.before)
        usual = [c for c in self.candidates if self.pattern.fullmatch(c.name) or c.name == self.pointed]
        if len({candidate.run_id for candidate in usual} - {None}) > 1:
            raise CheckpointError(
                f'{str(self.folder)!r} holds checkpoints of several runs: {", ".join(map(str, usual))}; '
                'name the one to continue with --resume PATH'
            )
        return usual  # a file of another name may be anybody's where no run is known

    def _order(self, candidate: Candidate) -> tuple:
        """Without ids, those later than ``last_checkpoint`` may be from before a return to it."""
        last = candidate.name == self.pointed
        return (last and candidate.run_id is None, candidate.iteration, candidate.epoch, last)

    def _origin(self, record: RunRecord | None) -> Iterator[Candidate]:
        """The checkpoint that the run began from, if it is still that one."""
        if record is not None and record.origin is not None:
            with contextlib.suppress(CheckpointError):
                place = read_place(self.folder / record.origin[0], record.origin[0])
                if place is not None and place.as_origin() == record.origin:
                    yield place


def is_own_file(folder: Path, name: str) -> bool:
    """Whether a name means a regular file of the folder, not a pipe or a device, nor a link to a file elsewhere."""
    try:
        path = (folder / name).resolve(strict=True)
        return path.is_file() and path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a link to itself, before Python 3.13
        return False


def read_place(path: str | Path, name: str) -> Candidate | None:
    """Where a checkpoint stands in its training; ``None`` for a file without training state.

    Raises:
        CheckpointError: As :func:`~vheat_mm.checkpoint.read_checkpoint`, but wrong checksums are not noticed.
    """
    register_safe_globals()
    try:
        with open_file(str(path)) as stream:
            check_content(stream, str(path), checksums=False)
            # Memory-mapped, so that the bytes of tensors are not read.
            checkpoint = torch.load(stream.name, map_location='cpu', weights_only=True, mmap=True)
    except Exception:  # corrupt, or in the format that cannot be mapped: read_checkpoint reports or reads it
        checkpoint = read_checkpoint(path)
    return place_of(checkpoint, name)


def place_of(checkpoint: Any, name: str) -> Candidate | None:
    """:func:`read_place` of what was read."""
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        return None
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    if not isinstance(meta, dict) or not isinstance(hub, dict):
        return None
    run_id, seed = meta.get(RUN_ID), meta.get('seed')
    numbers: list[Any] = [meta.get('iter'), meta.get('epoch'), 0 if seed is None else seed]
    if any(type(each) is not int or not 0 <= each < 1 << 32 for each in numbers):
        return None
    return Candidate(name, run_id if is_run_id(run_id) else None, numbers[0], numbers[1], seed)
