"""Whether PyTorch's safe loader may read a file: whole, and with nothing but harmless content."""

from __future__ import annotations

import io
import os
import tarfile
from typing import IO, cast

from vheat_mm.checkpoint.pickle_rules import CheckpointPickle
from vheat_mm.checkpoint.zip_layout import check_safetensors, check_zip, is_zip, open_file
from vheat_mm.utils.errors import CheckpointError

_LINE = 1000  # bytes of a module's or class's name
_STREAM_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def check_content(file: IO[bytes], name: str, checksums: bool = True) -> None:
    """Check a file that PyTorch's safe loader is to read, byte by byte, and what its pickle would do.

    Args:
        file: Open for reading; the position goes back to the start.
        name: Named in errors.
        checksums: Compute them, for which the whole file is read.

    Raises:
        CheckpointError: Truncated, damaged, or anything but tensors, numbers and names in it.
    """
    if is_zip(file):
        length = file.seek(0, os.SEEK_END)
        records = check_zip(file, name, checksums)
        pickled = records['data.pkl']
        file.seek(pickled.start)
        CheckpointPickle(name, records, length).read(io.BytesIO(file.read(pickled.size)))
    else:
        check_stream(file, name)
    file.seek(0)


def check_stream(file: IO[bytes], name: str) -> None:
    """Check PyTorch's format before 1.6: five pickles, then the storages, each with its length before it."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_STREAM_MAGIC)) != _STREAM_MAGIC or _is_tar(file):
        raise CheckpointError(f'{name!r} is damaged or no PyTorch file; compare its size with the source')
    file.seek(0)
    pickle = CheckpointPickle(name, None, length)
    bounded = cast(IO[bytes], _Bounded(file, length))
    for _ in range(4):  # magic number, version, machine, content
        pickle.read(bounded)
    keys = pickle.read_names(bounded)
    if sorted(keys) != sorted(pickle.storages):
        pickle.refuse('the storages behind its pickles are not those that its tensors use')
    for key in keys:
        storage = pickle.storages[key]
        end, count = file.tell() + 8 + storage.size, file.read(8)
        if len(count) == 8 and count != (storage.size // storage.unit).to_bytes(8, 'little'):
            pickle.refuse(f'storage {key[:50]!r} is not as long as its tensors say')
        file.seek(end)
    if file.tell() != length:
        raise CheckpointError(
            f'{name!r} is truncated or damaged: it has {length} bytes, not {file.tell()}. Copy it again.'
        )


class _Bounded:
    """A file that is asked for no more than it has: Python makes room for all that is asked for, however much."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self.file, self.length, self.tell = file, length, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.length - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(_LINE)


def _is_tar(file: IO[bytes]) -> bool:
    """Whether PyTorch would unpack the file as a tar; below 2.6 it runs what is in there."""
    file.seek(0)
    try:
        tarfile.open(fileobj=file, mode='r:').close()
    except Exception:  # of what is no tar, anything can fail
        return False
    return True


def verify_file(path: str | os.PathLike) -> None:
    """Check that a checkpoint file is whole: its structure, its size, and every checksum it has.

    Memory stays flat; the file is read once. Only zip files, which ``torch.save`` writes, have checksums.

    Args:
        path: Local file.

    Raises:
        CheckpointError: Missing, truncated or damaged file, or one that ``torch.save`` or safetensors never wrote.
    """
    name = os.fspath(path)
    from vheat_mm.checkpoint.verify import check_stream  # which builds on this file

    with open_file(name) as file:
        if is_zip(file):
            check_zip(file, name)
        elif name.endswith('.safetensors'):
            check_safetensors(file, name)
        else:
            check_stream(file, name)
