"""Checks of checkpoint files before PyTorch reads them: they are intact, and their pickles describe tensors only."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import IO

from vheat_mm.checkpoint.pickle_rules import inspect_pickles
from vheat_mm.checkpoint.zip_layout import check_zip, is_zip
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import expand_user
from vheat_mm.utils.text import first_line

_MAX_HEADER = 1 << 24  # bytes; a safetensors header has about 100 per tensor
_STREAM_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the first pickle of PyTorch's format before 1.6


def open_file(name: str) -> IO[bytes]:
    """Open a regular file that is not empty.

    Raises:
        CheckpointError: The file is missing, empty or unreadable, or it is a folder or a device.
    """
    try:
        path = expand_user(name)
        if not path.exists():
            raise CheckpointError(f'no checkpoint at {name!r} (working directory {str(Path.cwd())!r})')
        if not path.is_file() or path.stat().st_size == 0:
            raise CheckpointError(f'{name!r} is not a checkpoint: it is {"empty" if path.is_file() else "not a file"}')
        return path.open('rb')
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{name!r} cannot be read: {first_line(error)}') from error


def verify_file(path: str | os.PathLike) -> None:
    """Check that a checkpoint file is intact: its structure, its size, and every checksum in it.

    The file is read once, in blocks. Only zip files, which ``torch.save`` writes, have checksums.

    Args:
        path: Local file.

    Raises:
        CheckpointError: The file is missing, truncated, corrupt, or was not written by ``torch.save`` or safetensors.
    """
    name = os.fspath(path)
    with open_file(name) as file:
        verify(file, name, name.endswith('.safetensors'))


def verify(file: IO[bytes], name: str, safetensors: bool) -> None:
    """:func:`verify_file` of an open file, which has a path; ``name`` is for errors."""
    if is_zip(file):
        check_zip(file, name)
    elif safetensors:
        check_safetensors(file, name)
    else:
        check_stream(file, name)


def check_content(file: IO[bytes], name: str, checksums: bool = True) -> None:
    """Check a file before PyTorch's safe loader reads it: that it is intact, and what its pickle would create.

    Args:
        file: Open for reading; its position is reset to the start.
        name: Named in errors.
        checksums: Compare them, which reads the whole file.

    Raises:
        CheckpointError: The file is truncated or corrupt, or holds anything but tensors and plain values.
    """
    if is_zip(file):
        length = file.seek(0, os.SEEK_END)
        records = check_zip(file, name, checksums)
        file.seek(records['data.pkl'].start)
        inspect_pickles(io.BytesIO(file.read(records['data.pkl'].size)), name, length, records)
    else:
        check_stream(file, name)
    file.seek(0)


def check_stream(file: IO[bytes], name: str) -> None:
    """Check PyTorch's format before 1.6: five pickles, then the storages, each after its number of elements.

    Raises:
        CheckpointError: See :func:`check_content`.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_STREAM_MAGIC)) != _STREAM_MAGIC or _is_tar(file):
        raise CheckpointError(f'{name!r} is corrupt or not a PyTorch file; compare its size with the source')
    file.seek(0)
    for key, storage in inspect_pickles(file, name, length).items():
        end, count = file.tell() + 8 + storage.size, file.read(8)
        if len(count) == 8 and count != (storage.size // storage.unit).to_bytes(8, 'little'):
            raise CheckpointError(
                f'{name!r} is corrupt: storage {key[:50]!r} has another length than in its tensors. Copy it again.'
            )
        file.seek(end)
    if file.tell() != length:
        raise CheckpointError(
            f'{name!r} is truncated or corrupt: it has {length} bytes instead of {file.tell()}. Copy it again.'
        )


def _is_tar(file: IO[bytes]) -> bool:
    """Whether PyTorch would read the file as a tar; before 2.6 that runs code from it."""
    file.seek(0)
    try:
        tarfile.open(fileobj=file, mode='r:').close()
    except Exception:  # tarfile raises many types for other files
        return False
    return True


def check_safetensors(file: IO[bytes], name: str) -> None:
    """Check the header of a safetensors file with safetensors, which also requires that every byte belongs to a tensor.

    Raises:
        CheckpointError: The file is truncated or corrupt, or its header is too large; safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f'reading {name!r} needs safetensors: pip install safetensors') from error
    file.seek(0)
    header = int.from_bytes(file.read(8), 'little')
    if header > _MAX_HEADER:
        raise CheckpointError(
            f'{name!r} is corrupt or not a safetensors file: its header would have {header} bytes; at most '
            f'{_MAX_HEADER} are read'
        )
    try:
        with safe_open(file.name, framework='pt'):
            pass
    except Exception as error:  # safetensors raises its own, untyped errors
        raise CheckpointError(f'{name!r} is corrupt or not a safetensors file: {first_line(error)}') from error
