"""The checkpoint that a training resumes from: the newest intact one."""

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
from vheat_mm.checkpoint.verify import check_content, open_file, verify_file
from vheat_mm.utils.errors import CheckpointError

LAST = 'last_checkpoint'  # MMEngine's file with the path of the newest checkpoint
_OF_TRAINING = re.compile(r'(epoch|iter)_\d+\.pth$|interrupted\.pth$')
TRAINING_STATE = {'meta', 'state_dict', 'optimizer', 'message_hub'}


def find_newest(work_dir: str | Path, since: float | None = None) -> tuple[str | None, list[str]]:
    """Find the newest checkpoint that training can resume from.

    MMEngine trusts the file ``last_checkpoint``. After a crash of the machine the checkpoint that it names may be
    corrupt; after a kill between writing the two files it names an older checkpoint than the newest.

    Args:
        work_dir: Folder of the run. The folder that ``last_checkpoint`` points to is searched, too.
        since: Ignore checkpoints written before this time, in seconds since the epoch, and corrupt ones.

    Returns:
        Its path, or ``None`` if there is no checkpoint; and a line for the log for each corrupt one.

    Raises:
        CheckpointError: Every checkpoint is corrupt; or the last one is gone, and there is no other.
    """
    named = _named_last(Path(work_dir))
    if named is not None and '://' in named:  # in remote storage, which cannot be listed here
        return named, []
    last = Path(named) if named is not None else None
    if last is not None and last.is_dir() and since is None:  # DeepSpeed's format, which only its own loader reads
        return named, []
    folders = [Path(work_dir), *([last.parent] if last is not None else [])]
    files = {path.resolve(): path for folder in folders for path in folder.glob('*.pth') if path.is_file()}
    if last is not None and last.is_file():
        files.setdefault(last.resolve(), last)  # with any suffix
    corrupt: dict[Path, str] = {}
    candidates = []
    for key, path in files.items():
        try:
            progress, written = _progress(path)
        except CheckpointError as error:
            corrupt[key] = str(error)
            continue
        if progress is not None and (since is None or written >= since):
            candidates.append((progress, path.stat().st_mtime, path))
    for path in _in_order(candidates, named, Path(work_dir) / LAST):
        try:
            verify_file(path)
        except CheckpointError as error:
            corrupt[path.resolve()] = str(error)
            continue
        return str(path), [f'left out: {reason}' for reason in corrupt.values()]
    if since is not None:  # an older checkpoint may be intact
        return None, []
    if last is not None and last.resolve() in files.keys() - corrupt.keys():
        return named, []  # its run was configured to save no optimizer state
    lost = [
        reason
        for path, reason in corrupt.items()
        if _OF_TRAINING.match(path.name) or (last is not None and path == last.resolve())
    ]
    if lost:
        raise CheckpointError(
            f'no intact checkpoint to resume from in {str(work_dir)!r}: {"; ".join(lost)}. '
            'Restore an intact copy, or move these files away to start from scratch'
        )
    if last is not None and not last.exists():
        raise CheckpointError(
            f'{str(Path(work_dir) / LAST)!r} names {named!r}, which is not there: restore it, name another with '
            f'--resume PATH, or remove {LAST} to start from scratch'
        )
    return None, [f'left out: {reason}' for reason in corrupt.values()]


def _in_order(candidates: list[tuple[tuple[int, int], float, Path]], named: str | None, pointer: Path) -> list[Path]:
    """Newest first: those written after ``last_checkpoint``, the one it names, then by iteration.

    By iteration alone, a run that was resumed from an earlier checkpoint would return to the abandoned later ones.
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


def _progress(path: Path) -> tuple[tuple[int, int] | None, float]:
    """(iteration, epoch) of a checkpoint, and when it was written by the clock of the machine that wrote it.

    The former is ``None`` for a file without training state, such as pretrained weights.
    """
    checkpoint = peek(path)
    meta = checkpoint.get('meta')
    if not checkpoint.keys() >= TRAINING_STATE or not isinstance(meta, dict):
        return None, 0.0
    iteration, epoch = meta.get('iter'), meta.get('epoch')
    if not isinstance(iteration, int) or not isinstance(epoch, int):
        return None, 0.0
    try:
        written = time.mktime(time.strptime(str(meta.get('time')), '%Y%m%d_%H%M%S')) + 1  # rounded down to seconds
    except (ValueError, OverflowError):
        written = path.stat().st_mtime
    return (iteration, epoch), written


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


def stale_parts(folder: str | Path) -> Iterator[Path]:
    """Temporary files of a process that was killed while it wrote them."""
    yield from Path(folder).glob(f'.*.pth.*{PARTIAL}')
    yield from Path(folder).glob(f'.{LAST}.*{PARTIAL}')
