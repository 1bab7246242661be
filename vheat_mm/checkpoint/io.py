"""Reading untrusted checkpoints safely, and writing checkpoints atomically.

Files of ``torch.save`` (both of its formats) go through PyTorch's safe loader, ``.safetensors`` files through
safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vheat_mm.checkpoint.cache import FETCH_AGAIN, local_file
from vheat_mm.checkpoint.released import find_released
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.sharded import INDEX, find_file, find_shards, read_shards
from vheat_mm.checkpoint.verify import check_content, check_safetensors, open_file
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import atomic_file
from vheat_mm.utils.text import first_line, is_address

StateDict = dict[str, Tensor]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code from it.

    Args:
        path: Local path, http(s) URL (downloaded once, into PyTorch's hub cache, under a name of its own for each
            address), or a name of :mod:`vheat_mm.checkpoint.released`. A path may name the index of a checkpoint in
            several files, or a folder: see :mod:`vheat_mm.checkpoint.sharded`.

    Raises:
        CheckpointError: The file is missing, truncated or corrupt, or holds a class that is not on the list of allowed
            ones.
    """
    place = find_checkpoint(path)
    name = os.fspath(path)
    try:
        return read_shards(place, name, _read_file) if place.endswith(INDEX) else _read_file(place, name)
    except CheckpointError as error:
        if is_address(name) or find_released(name):
            raise CheckpointError(f'{error}. The file is {place!r}: {FETCH_AGAIN}') from error
        raise


def find_checkpoint(path: str | os.PathLike) -> str:
    """The local file that :func:`read_checkpoint` begins with, downloaded if need be.

    Raises:
        CheckpointError: It is not named by text, or there is none.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise CheckpointError(f'a checkpoint is a path, an address or a name of released weights, got {path!r}')
    name = os.fspath(path)
    if is_address(name):
        find_file(name)  # an address of one of several files is refused before it is downloaded
    return find_file(local_file(name))


def files_of(place: str) -> list[Path]:
    """All files that are read from what :func:`find_checkpoint` has returned."""
    shards = find_shards(place, place) if place.endswith(INDEX) else {}
    return [Path(file).expanduser() for file in (place, *shards)]


def _read_file(path: str, name: str) -> dict[str, Any]:
    """Read one local file; ``name`` is for errors."""
    with open_file(path) as stream:
        if stream.name.endswith('.safetensors'):
            check_safetensors(stream, name)
            return _read_safetensors(Path(stream.name))
        return read_stream(stream, name)


def read_stream(stream: IO[bytes], name: str) -> dict[str, Any]:
    """Read what ``torch.save`` wrote, as :func:`read_checkpoint`; ``name`` is for errors."""
    check_content(stream, name)
    checkpoint = _load_safely(stream, name)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{name!r} holds a {type(checkpoint).__name__}, not a checkpoint dict')
    return checkpoint


def _load_safely(stream: IO[bytes], name: str) -> Any:
    register_safe_globals()
    try:
        return torch.load(stream, map_location='cpu', weights_only=True)
    except Exception as error:  # PyTorch raises many types for a corrupt file
        reason = str(error).split('WeightsUnpickler error:')[-1]  # without PyTorch's advice: weights_only=False
        hint = '' if torch.__version__ >= '2.6' else '; classes of MMEngine and yacs need PyTorch >= 2.6'
        raise CheckpointError(
            f'{name!r} is truncated, corrupt or not a PyTorch file ({type(error).__name__}: {first_line(reason)}); '
            f'compare its size with the source and copy it again{hint}'
        ) from error


def save_atomically(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint atomically: if writing fails, ``path`` keeps its earlier content.

    Args:
        checkpoint: For a ``.safetensors`` path a flat dict of tensors, otherwise anything ``torch.save`` takes.
        path: Target; its folder must exist.

    Raises:
        CheckpointError: No such folder, no permission, disk full, or ``path`` is a device. The partial file is removed.
    """
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise CheckpointError(f'cannot write {str(target)!r}: there is no folder {str(target.parent)!r}')
    if target.exists() and not target.is_file():
        raise CheckpointError(f'cannot write {str(target)!r}: it is a folder or a device; name a file')
    try:
        with atomic_file(target) as file:
            if target.suffix == '.safetensors':
                from safetensors.torch import save

                file.write(save({key: value.contiguous() for key, value in checkpoint.items()}))
            else:
                torch.save(checkpoint, file)
    except ModuleNotFoundError as error:
        raise CheckpointError(f'writing {str(target)!r} needs safetensors: pip install safetensors') from error
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer raises RuntimeError when the disk is full
        raise CheckpointError(
            f'could not write {str(target)!r} ({first_line(error)}); its earlier content is unchanged. '
            'Free some space or choose another folder.'
        ) from error


def _read_safetensors(file: Path) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise CheckpointError(f'reading {str(file)!r} needs safetensors: pip install safetensors') from error
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own, untyped errors
        raise CheckpointError(f'{str(file)!r} is corrupt or not a safetensors file: {first_line(error)}') from error
