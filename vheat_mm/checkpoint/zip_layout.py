"""Whether a checkpoint file is whole, found out without loading it: PyTorch's own reader compares no checksums."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

MAX_RECORDS = 1 << 16  # a detector with its optimizer has some thousands
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 24  # of a safetensors file: some 100 bytes per tensor
_ZIP_MAGIC = b'PK\x03\x04'
# The zip format's structures, see https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, section 4.3
_LOCAL = struct.Struct('<4s5H3I2H')
_END = struct.Struct('<4s4H2IH')
_END64 = struct.Struct('<4sQ2H2I4Q')
_LOCATOR64 = struct.Struct('<4sIQI')
_FOLDER = 0x10  # attribute of MS-DOS
_DESCRIPTOR = 24  # bytes that may follow a record, repeating its checksum and sizes


@dataclass
class Record:
    """Where a record's bytes lie in the file."""

    start: int
    size: int


def open_file(name: str) -> IO[bytes]:
    """Open a regular file that is not empty.

    Raises:
        CheckpointError: Missing, empty, a folder or a device, or not to be read.
    """
    try:
        path = Path(name).expanduser()
        if not path.exists():
            raise CheckpointError(f'no checkpoint at {name!r} (working directory {str(Path.cwd())!r})')
        if not path.is_file() or path.stat().st_size == 0:
            raise CheckpointError(f'{name!r} is not a checkpoint: it is {"empty" if path.is_file() else "no file"}')
        return path.open('rb')
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{name!r} cannot be read: {first_line(error)}') from error
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f'{name!r} cannot be read: {error}') from error  # ~nobody: no home


def is_zip(file: IO[bytes]) -> bool:
    """Whether PyTorch will read the file as a zip; the position goes back to the start."""
    file.seek(0)
    start = file.read(len(_ZIP_MAGIC))
    file.seek(0)
    return start == _ZIP_MAGIC


def check_safetensors(file: IO[bytes], name: str) -> None:
    """Check a safetensors file: its header by safetensors itself, which also wants every byte to belong to a tensor.

    Raises:
        CheckpointError: Truncated, damaged, or with more tensors than any model has; safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f'reading {name!r} needs safetensors: pip install safetensors') from error
    file.seek(0)
    header = int.from_bytes(file.read(8), 'little')
    if header > _MAX_HEADER:
        raise CheckpointError(
            f'{name!r} is damaged or no safetensors file: it says its header is {header} bytes long, and at most '
            f'{_MAX_HEADER} are read'
        )
    try:
        with safe_open(file.name, framework='pt'):
            pass
    except Exception as error:  # safetensors raises its own, untyped errors
        raise CheckpointError(f'{name!r} is damaged or no safetensors file: {first_line(error)}') from error


def check_zip(file: IO[bytes], name: str, checksums: bool = True) -> dict[str, Record]:
    """Check a zip file of ``torch.save``, byte by byte.

    All that PyTorch writes is laid out in one way: records that are stored (not compressed), one after the other, then
    their directory, then the end. Any other layout is refused, so that this check and PyTorch's reader, which trusts
    the directory, cannot see different records.

    Args:
        file: Open for reading.
        name: Named in errors.
        checksums: Compute them, for which the whole file is read.

    Returns:
        Its records by name, without the folder that all of them are in.

    Raises:
        CheckpointError: Truncated, damaged, or of another layout.
    """
    size = file.seek(0, os.SEEK_END)
    directory, count = _find_directory(file, name, size)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except Exception as error:  # a damaged directory can fail anywhere in it
        _refuse(name, f'its zip directory cannot be read ({type(error).__name__}: {first_line(error)})')
    if any(info.filename.endswith('/constants.pkl') for info in infos):
        raise CheckpointError(f'{name!r} is a TorchScript program: save its state_dict() with torch.save instead')
    if len(infos) != count:
        _refuse(name, f'its zip directory lists {len(infos)} records and counts {count}')

    unsummed = not checksums or all(info.CRC == 0 for info in infos)  # torch.serialization.set_crc32_options(False)
    records: dict[str, Record] = {}
    spellings: set[str] = set()
    position = 0
    for info in infos:
        _check_entry(info, name)
        record = _locate(file, name, info, position)
        position = record.start + record.size
        if position > directory:
            _refuse(name, f'record {info.filename!r} runs beyond the records')
        if not unsummed and _checksum(file, record) != info.CRC:
            _refuse(name, f'the checksum of record {info.filename!r} is wrong')
        if info.filename.lower() in spellings:  # PyTorch finds records whatever the case
            _refuse(name, f'record {info.filename!r} is there twice')
        spellings.add(info.filename.lower())
        records[info.filename.partition('/')[2]] = record
    if directory - position > _DESCRIPTOR:
        _refuse(name, f'{directory - position} bytes before its zip directory belong to no record')
    if len({info.filename.partition('/')[0] for info in infos}) != 1 or 'data.pkl' not in records:
        _refuse(name, 'it holds no data.pkl in one folder with all other records')
    return records


def _find_directory(file: IO[bytes], name: str, size: int) -> tuple[int, int]:
    """Where the zip directory starts, and how many records it counts."""
    tail_size = _END64.size + _LOCATOR64.size + _END.size
    file.seek(max(size - tail_size, 0))
    tail = file.read(tail_size).rjust(tail_size, b'\0')
    magic, _, _, _, count, length, start, comment = _END.unpack_from(tail, _END64.size + _LOCATOR64.size)
    if magic != b'PK\x05\x06' or comment:
        _refuse(name, f'its {size} bytes do not end as a zip file of PyTorch does')
    end = size - _END.size
    locator, _, located, _ = _LOCATOR64.unpack_from(tail, _END64.size)
    if locator == b'PK\x06\x07':
        end = size - tail_size
        magic, *_, count, length, start = _END64.unpack_from(tail)
        if magic != b'PK\x06\x06' or located != end:
            _refuse(name, 'its zip64 end is damaged')
    if start + length != end:
        _refuse(name, 'its zip directory is not where the end of the file says')
    if count > MAX_RECORDS or length > 1024 * count:
        _refuse(name, f'it counts {count} records in a zip directory of {length} bytes; at most {MAX_RECORDS} are read')
    return start, count


def _check_entry(info: zipfile.ZipInfo, name: str) -> None:
    """Refuse what PyTorch never writes into a zip directory."""
    filename = info.orig_filename
    plain = filename.isascii() and filename.isprintable() and not filename.startswith('/') and '\\' not in filename
    if not plain or filename != info.filename or {'..', '.', ''} & set(filename.split('/')):
        _refuse(name, f'record {filename[:100]!r} is not named as PyTorch names records')
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        _refuse(name, f'record {filename!r} is compressed, which PyTorch never does')
    if info.flag_bits & 1:
        _refuse(name, f'record {filename!r} is encrypted')
    if info.external_attr & _FOLDER:  # PyTorch's reader would return memory it never wrote to
        _refuse(name, f'record {filename!r} is marked as a folder')
    if info.extra and struct.unpack('<2H', info.extra[:4].ljust(4, b'\0')) != (1, len(info.extra) - 4):
        _refuse(name, f'record {filename!r} has fields in the zip directory which PyTorch does not write')


def _locate(file: IO[bytes], name: str, info: zipfile.ZipInfo, position: int) -> Record:
    """Where a record's bytes are by its own header, which must follow what ends at ``position``."""
    if not 0 <= info.header_offset - position <= (_DESCRIPTOR if position else 0):
        _refuse(name, f'record {info.filename!r} overlaps with another, or does not follow it')
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) != _LOCAL.size or not header.startswith(_ZIP_MAGIC):
        _refuse(name, f'the header of record {info.filename!r} is damaged')
    name_size, extra_size = _LOCAL.unpack(header)[-2:]
    if file.read(name_size) != info.filename.encode():
        _refuse(name, f'record {info.filename!r} has another name in its header')
    return Record(info.header_offset + _LOCAL.size + name_size + extra_size, info.file_size)


def _checksum(file: IO[bytes], record: Record) -> int:
    file.seek(record.start)
    checksum, left = 0, record.size
    while left and (chunk := file.read(min(left, _CHUNK))):
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return checksum


def _refuse(name: str, reason: str) -> NoReturn:
    raise CheckpointError(f'{name!r} is truncated or damaged: {reason}. Copy it again from its source.')
