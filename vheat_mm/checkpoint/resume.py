"""The checkpoint that a training resumes from: the newest intact one of its run."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from string import Formatter
from typing import Any

import torch

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.run_folder import LAST, RunRecord, is_run_id, not_readable, read_record, read_small
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import check_content, open_file, verify_file
from vheat_mm.utils.errors import CheckpointError

INTERRUPTED = 'interrupted.pth'  # one name, so that repeated interruptions do not fill the disk
RUN_ID = 'vheat_run_id'  # in a checkpoint's meta
_STATE = {'meta', 'state_dict', 'message_hub'}
_NAMES = rf'(epoch|iter)_\d+\.(pth|pt|ckpt)|{re.escape(INTERRUPTED)}'
_UNUSABLE = 'restore an intact copy, name another one with --resume PATH, or move {} away to start from scratch'


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint with training state.

    ``run_id`` is ``None`` for one that this package did not write; iteration and epoch are -1 where unknown.
    """

    name: str
    run_id: str | None
    iteration: int
    epoch: int
    seed: int | None = None

    def __str__(self) -> str:
        return f'{self.name} (epoch {self.epoch}, iteration {self.iteration}, run {self.run_id or "unknown"})'


def find_newest(
    work_dir: str | Path, folder: str | Path | None = None, template: str | None = None
) -> tuple[str | None, list[str]]:
    """Find the newest checkpoint that training can resume from.

    MMEngine trusts the path in the file ``last_checkpoint``, whatever it is. Here only files of the folder count that
    are named as checkpoints and bear the id of its run, the highest iteration first. Times and clocks do not matter.

    Args:
        work_dir: Folder of the run.
        folder: Folder of its checkpoints if that is another one.
        template: Their names, with ``{}`` for a number, beside ``epoch_N.pth``, ``iter_N.pth``, ``interrupted.pth``.

    Returns:
        Its path, or ``None`` if there is no checkpoint; and lines for the log.

    Raises:
        CheckpointError: Every checkpoint of the run is corrupt or gone; or they are of several unknown runs.
    """
    work_dir = Path(work_dir)
    record, notes = read_record(work_dir)
    scan = Scan(work_dir, Path(folder or work_dir), template)
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
        corrupt: Name to reason.
    """

    def __init__(self, work_dir: Path, folder: Path, template: str | None) -> None:
        self.work_dir, self.folder = work_dir, folder
        self.candidates: list[Candidate] = []
        self.corrupt: dict[str, str] = {}
        self.notes: list[str] = []
        pattern = names_of(template)
        below = re.sub(r'\{[^}]*\}', '*', template or '') if '/' in (template or '') else '*'
        paths = {*folder.glob('*'), *folder.glob(below)} if folder.is_dir() else set()
        names = {name for path in paths if pattern.fullmatch(name := path.relative_to(folder).as_posix())}
        self.pointed, self.pointer_lost = self._pointer(names, pattern)
        for name in sorted({*names, *([self.pointed] if self.pointed else [])}):
            if (folder / name).is_dir():  # DeepSpeed's format, which only its own loader reads
                continue
            if reason := not_readable(folder, name):
                self.notes.append(f'{name} is not used: {reason}')
                continue
            try:
                candidate = read_place(folder / name, name)
            except CheckpointError as error:
                self.corrupt[name] = str(error)
                continue
            if candidate is not None:
                self.candidates.append(candidate)

    def _pointer(self, names: set[str], pattern: re.Pattern) -> tuple[str | None, bool]:
        """The name in ``last_checkpoint`` if such a file is in the folder; whether it names one that is gone."""
        path = self.work_dir / LAST
        content = read_small(path)
        if content is None:
            if os.path.lexists(path):
                self.notes.append(f'{LAST} is not used: it is not a small regular file')
            return None, False
        text = os.fsdecode(content).rstrip('\n')
        matches = [name for name in names if text == name or text.endswith(f'/{name}')]
        if matches:
            return max(matches, key=len), False
        name = text.rsplit('/', 1)[-1]
        usual = len(os.fsencode(name)) < 256 and '\0' not in name and not name.startswith('.') and name != ''
        if usual and os.path.lexists(self.folder / name):
            return name, False
        shown = text if len(text) < 200 else f'{text[:100]}...'
        self.notes.append(f'{LAST} is not used: {shown!r} names no file of {str(self.folder)!r}')
        return None, usual and pattern.fullmatch(name) is not None

    def choose(self, record: RunRecord | None) -> tuple[Candidate | None, list[str]]:
        """The newest intact checkpoint of the run, and lines for the log. Raises CheckpointError; see find_newest."""
        folder, notes = str(self.folder), list(self.notes)
        ours = self.pointed if record is None or self.pointed in record.names else None
        if ours is not None and (self.folder / ours).is_dir():
            return Candidate(ours, None, -1, -1), notes
        accepted = self.accepted(record)
        if foreign := [str(candidate) for candidate in self.candidates if candidate not in accepted]:
            notes.append(f'checkpoints of other runs are passed over: {", ".join(foreign)}')
        for candidate in self._in_order(accepted):
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
        if record is not None and record.saved:
            raise CheckpointError(
                f'run {record.id} has saved checkpoints in {folder!r}, and none of them is there any more: '
                f'{_UNUSABLE.format("run.json")}'
            )
        if self.pointer_lost and not self.candidates:
            raise CheckpointError(
                f'{self.notes[-1]}, and there is no other checkpoint: restore it, name another with --resume PATH, or '
                f'remove {LAST} to start from scratch'
            )
        return None, notes

    def of_run(self, run_id: str) -> list[Candidate]:
        """Checkpoints with that id."""
        return [candidate for candidate in self.candidates if candidate.run_id == run_id]

    def accepted(self, record: RunRecord | None) -> list[Candidate]:
        """The checkpoints of this folder's run. Raises CheckpointError if that run is unknown."""
        without = [c for c in self.candidates if c.run_id is None and (record is None or c.name in record.names)]
        if record is not None:
            for run_id in (record.id, *([] if record.saved else [record.before])):
                if run_id is not None and ((own := self.of_run(run_id)) or record.saved or run_id == record.before):
                    return own + without
        ids = {candidate.run_id for candidate in self.candidates} - {None}
        if len(ids) > 1:
            raise CheckpointError(
                f'{str(self.folder)!r} holds checkpoints of several runs: {", ".join(map(str, self.candidates))}; '
                'name the one to continue with --resume PATH'
            )
        return list(self.candidates)

    def _in_order(self, candidates: list[Candidate]) -> list[Candidate]:
        """The newest first. Without ids, those later than ``last_checkpoint`` may be from before a return to it."""
        last = [c for c in candidates if c.name == self.pointed]

        def key(candidate: Candidate) -> tuple:
            place = (candidate.iteration, candidate.epoch)
            if candidate.run_id is not None:
                return (2, *place, candidate in last)
            return (candidate in last or not last or place < (last[0].iteration, last[0].epoch), *place)

        return sorted(candidates, key=key, reverse=True)


def read_place(path: str | Path, name: str) -> Candidate | None:
    """Where a checkpoint stands in its training; ``None`` for a file without training state.

    Raises:
        CheckpointError: See :func:`peek`.
    """
    checkpoint = peek(path)
    meta = checkpoint.get('meta')
    if not checkpoint.keys() >= _STATE or not isinstance(meta, dict):
        return None
    iteration, epoch, run_id, seed = (meta.get(key) for key in ('iter', 'epoch', RUN_ID, 'seed'))
    if type(iteration) is not int or type(epoch) is not int:
        return None
    return Candidate(name, run_id if is_run_id(run_id) else None, iteration, epoch, seed if type(seed) is int else None)


def peek(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint with its tensors memory-mapped, so that their bytes are not read.

    Raises:
        CheckpointError: As :func:`~vheat_mm.checkpoint.read_checkpoint`, but wrong checksums are not noticed.
    """
    register_safe_globals()
    try:
        with open_file(str(path)) as stream:
            check_content(stream, str(path), checksums=False)
            checkpoint = torch.load(stream.name, map_location='cpu', weights_only=True, mmap=True)
    except Exception:  # corrupt, or in the format that cannot be mapped: read_checkpoint reports or reads it
        checkpoint = read_checkpoint(path)
    return checkpoint if isinstance(checkpoint, dict) else {}
