"""Which checkpoint a training goes on from: the newest whole one."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vheat_mm.checkpoint.io import PARTIAL, read_checkpoint
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import check_content, verify_file
from vheat_mm.checkpoint.zip_layout import open_file
from vheat_mm.utils.errors import CheckpointError

LAST = 'last_checkpoint'  # MMEngine's file with the path of the newest checkpoint
_OF_TRAINING = re.compile(r'(epoch|iter)_\d+\.pth$|interrupted\.pth$')
TRAINING_STATE = {'meta', 'state_dict', 'optimizer', 'message_hub'}


def find_newest(work_dir: str | Path, since: float | None = None) -> tuple[str | None, list[str]]:
    """Find the newest checkpoint that training can go on from.

    MMEngine trusts the file ``last_checkpoint``, which names a damaged checkpoint after a crash of the machine, and
    an older one than there is after a kill between the two files.

    Args:
        work_dir: Folder of the run. The folder that ``last_checkpoint`` points to is searched, too.
        since: Leave out checkpoints written before this time, in seconds since the epoch, and what is damaged.

    Returns:
        Its path, or ``None`` where there is no checkpoint; and a line for the log for each damaged one.

    Raises:
        CheckpointError: Every checkpoint is damaged; or the last one is gone, and there is no other.
    """
    named = _named_last(Path(work_dir))
    if named is not None and '://' in named:  # in a remote storage, which cannot be listed here
        return named, []
    last = Path(named) if named is not None else None
    if last is not None and last.is_dir() and since is None:  # DeepSpeed's, which only its own loader reads
        return named, []
    folders = [Path(work_dir), *([last.parent] if last is not None else [])]
    files = {path.resolve(): path for folder in folders for path in folder.glob('*.pth') if path.is_file()}
    if last is not None and last.is_file():
        files.setdefault(last.resolve(), last)  # of whatever suffix
    damaged: dict[Path, str] = {}
    candidates = []
    for key, path in files.items():
        try:
            place, written = _place(path)
        except CheckpointError as error:
            damaged[key] = str(error)
            continue
        if place is not None and (since is None or written >= since):
            candidates.append((place, path.stat().st_mtime, path))
    for path in _in_order(candidates, named, Path(work_dir) / LAST):
        try:
            verify_file(path)
        except CheckpointError as error:
            damaged[path.resolve()] = str(error)
            continue
        return str(path), [f'left out: {reason}' for reason in damaged.values()]
    if since is not None:  # others may be whole, and older
        return None, []
    if last is not None and last.resolve() in files.keys() - damaged.keys():
        return named, []  # without the optimizer's state, as its run was configured
    lost = [
        reason
        for path, reason in damaged.items()
        if _OF_TRAINING.match(path.name) or (last is not None and path == last.resolve())
    ]
    if lost:
        raise CheckpointError(
            f'nothing whole to resume from in {str(work_dir)!r}: {"; ".join(lost)}. '
            'Bring back a whole copy, or move these files away to start anew'
        )
    if last is not None and not last.exists():
        raise CheckpointError(
            f'{str(Path(work_dir) / LAST)!r} names {named!r}, which is not there: bring it back, name another with '
            f'--resume PATH, or remove {LAST} to start anew'
        )
    return None, [f'left out: {reason}' for reason in damaged.values()]


def _in_order(candidates: list[tuple[tuple[int, int], float, Path]], named: str | None, pointer: Path) -> list[Path]:
    """Newest first: what was written after ``last_checkpoint``, what it names, then by iteration.

    Iterations alone would go back to a branch left behind, where a run was resumed from an earlier checkpoint by name.
    """
    candidates = sorted(candidates, reverse=True)
    last = [
        candidate for candidate in candidates if named is not None and candidate[2].resolve() == Path(named).resolve()
    ]
    if last:
        written = pointer.stat().st_mtime
        later = [candidate for candidate in candidates if candidate[0] > last[0][0] and candidate[1] > written]
        earlier = [candidate for candidate in candidates if candidate[0] < last[0][0]]
        candidates = list(dict.fromkeys([*later, *last, *earlier, *candidates]))
    return [path for _, _, path in candidates]


def _named_last(work_dir: Path) -> str | None:
    with contextlib.suppress(OSError):
        return (work_dir / LAST).read_text(encoding='utf-8', errors='replace').strip() or None
    return None


def _place(path: Path) -> tuple[tuple[int, int] | None, float]:
    """(iteration, epoch) of a checkpoint, and when it was written by the clock of the machine that wrote it.

    The place is ``None`` for weights only, such as the best or pre-trained ones.
    """
    checkpoint = peek(path)
    meta = checkpoint.get('meta')
    if not checkpoint.keys() >= TRAINING_STATE or not isinstance(meta, dict):
        return None, 0.0
    iteration, epoch = meta.get('iter'), meta.get('epoch')
    if not isinstance(iteration, int) or not isinstance(epoch, int):
        return None, 0.0
    try:
        written = time.mktime(time.strptime(str(meta.get('time')), '%Y%m%d_%H%M%S')) + 1  # cut to seconds
    except (ValueError, OverflowError):
        written = path.stat().st_mtime
    return (iteration, epoch), written


def peek(path: str | Path) -> dict[str, Any]:
    """A checkpoint without its tensors' bytes, which are mapped and never touched.

    Raises:
        CheckpointError: As :func:`~vheat_mm.checkpoint.read_checkpoint`, but for wrong checksums.
    """
    register_safe_globals()
    try:
        with open_file(str(path)) as stream:
            check_content(stream, str(path), checksums=False)
            checkpoint = torch.load(stream.name, map_location='cpu', weights_only=True, mmap=True)
    except Exception:  # damaged, an address, or of the format that cannot be mapped: the full reader tells
        checkpoint = read_checkpoint(path)
    return checkpoint if isinstance(checkpoint, dict) else {}


def stale_parts(folder: str | Path) -> Iterator[Path]:
    """Files that a killed process was writing when it ended."""
    yield from Path(folder).glob(f'.*.pth.*{PARTIAL}')
    yield from Path(folder).glob(f'.{LAST}.*{PARTIAL}')
