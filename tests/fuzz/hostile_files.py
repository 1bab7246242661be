"""Hostile and harmless checkpoint files, written by code."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from fuzz.hostile_pickles import FRAGMENTS, LIST, STOP, number, text

State = dict[str, torch.Tensor]


def records_of(state: object) -> dict[str, bytes]:
    """The records of a torch file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {entry.partition('/')[2]: archive.read(entry) for entry in archive.namelist()}


def write_zip(path: Path, records: dict[str, bytes], deflate: bool = False, folder: str = 'archive/') -> None:
    """A zip file of these records, with correct checksums."""
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w', kind) as archive:
        warnings.simplefilter('ignore')  # of names given twice
        for entry, content in records.items():
            archive.writestr(folder + entry.split('#')[0], content)


def with_fragment(state: State, fragment: bytes, **more: bytes) -> dict[str, bytes]:
    """A valid checkpoint with one more value, given as opcodes."""
    records = records_of({'model': state})
    records['data.pkl'] = records['data.pkl'][:-1] + text('extra') + fragment + b's' + STOP
    return records | {f'data/{key}': content for key, content in more.items()}


# --- other contents


def _sparse(state: State) -> dict:
    return state | {'head.w': torch.eye(3).to_sparse()}


def _quantized(state: State) -> dict:
    return state | {'head.w': torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)}


def _with(key: object, value: object) -> Callable[[State], dict]:
    return lambda state: state | {key: value}


def _transposed(value: torch.Tensor) -> torch.Tensor:
    return value.t().contiguous().t() if value.ndim == 2 else value


FVE = 'freq_embed.0'
SAVED: dict[str, Callable[[State], object]] = {
    'sparse tensor': _sparse,
    'quantized tensor': _quantized,
    'meta tensor': _with('head.w', torch.empty(10**6, 10**6, device='meta')),
    'complex weights': lambda state: state | {'outnorm0.bias': torch.zeros(4, dtype=torch.complex64)},
    'integer weights': lambda state: state | {'outnorm0.bias': torch.zeros(4, dtype=torch.int64)},
    'boolean grid': lambda state: state | {FVE: torch.zeros(16, 16, 4, dtype=torch.bool)},
    'grid without entries': _with(FVE, torch.zeros(0, 16, 4)),
    'gigantic grid': _with(FVE, torch.zeros(1).expand(8192, 8192, 4)),
    'gigantic grid, narrow': _with(FVE, torch.zeros(1).expand(1 << 24, 1, 4)),
    'grid of many channels': _with(FVE, torch.zeros(1, 1, 200_000)),
    'gigantic width': _with('patch_embed.conv1.weight', torch.zeros(1).expand(100_000, 3, 3, 3)),
    'keys that are numbers': _with(7, torch.ones(3)),
    'not a dict': lambda state: list(state.values()),
}

# read_checkpoint must load these, whether or not they are a model's weights.
HARMLESS: dict[str, Callable[[State], object]] = {
    'plain': lambda state: state,
    'one number for all': lambda state: {key: torch.zeros(1).expand(value.shape) for key, value in state.items()},
    'NaN and infinity': _with('patch_embed.conv1.bias', torch.tensor([float('nan'), float('inf')])),
    'half precision': lambda state: {key: value.bfloat16() for key, value in state.items()},
    'transposed': lambda state: {key: _transposed(value) for key, value in state.items()},
    'keys like paths': _with('../../etc/passwd', torch.ones(1)),
    'keys with terminal escapes': _with('\x1b]0;owned\x07\nhead', torch.ones(1)),
    'complex beside the weights': lambda state: {'model': state, 'spectrum': torch.zeros(3, dtype=torch.complex64)},
    'parameters': lambda state: {key: torch.nn.Parameter(value) for key, value in state.items()},
    '20 000 keys': lambda state: {'model': state, 'names': {f'key{i}': i for i in range(20_000)}},
}  # fmt: skip


# --- files


def _stored(state: State) -> dict[str, bytes]:
    return records_of({'model': state})


def _patched(path: Path, find: bytes, offset: int, new: bytes, last: bool = True) -> None:
    """Overwrite bytes at a distance from a signature."""
    raw = bytearray(path.read_bytes())
    at = (raw.rfind(find) if last else raw.find(find)) + offset
    raw[at : at + len(new)] = new
    path.write_bytes(raw)


def _zip(change: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda r: r, **options: object):
    return lambda path, state: write_zip(path, change(_stored(state)), **options)


def _zip_patched(find: bytes, offset: int, new: bytes):
    def write(path: Path, state: State) -> None:
        write_zip(path, _stored(state))
        _patched(path, find, offset, new)

    return write


def _deflate_bomb(path: Path, state: State) -> None:
    """A record of a few MB that expands to 4 GB: written by repeating one compressed block."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for entry, content in _stored(state).items():
            archive.writestr(f'archive/{entry}', content)
        with archive.open('archive/data/bomb', 'w', force_zip64=True) as file:
            block = bytes(1 << 24)
            for _ in range(32):
                file.write(block)


def _overlapping(path: Path, state: State) -> None:
    """Each record of the directory is the first one's bytes."""
    write_zip(path, _stored(state))
    raw = path.read_bytes()
    position = raw.find(b'PK\x01\x02')
    first = struct.unpack_from('<3I', raw, position + 16)
    changed = bytearray(raw)
    while (position := raw.find(b'PK\x01\x02', position + 1)) > 0:
        struct.pack_into('<3I', changed, position + 16, *first)
        struct.pack_into('<I', changed, position + 42, 0)
    path.write_bytes(changed)


def _prepended(path: Path, state: State) -> None:
    write_zip(path, _stored(state))
    path.write_bytes(b'PK\x03\x04' + bytes(60) + path.read_bytes())


def _torchscript(path: Path, state: State) -> None:
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path))


def _tar(path: Path, state: State) -> None:
    with tarfile.open(path, 'w') as archive:
        for entry in ('storages', 'tensors', 'pickle'):
            content = pickle.dumps(0, 2) if entry != 'pickle' else b'\x80\x02' + FRAGMENTS['os.system'] + STOP
            info = tarfile.TarInfo(entry)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _stream(change: Callable[[bytes], bytes]):
    def write(path: Path, state: State) -> None:
        buffer = io.BytesIO()
        torch.save({'model': state}, buffer, _use_new_zipfile_serialization=False)
        path.write_bytes(change(buffer.getvalue()))

    return write


def _gap(path: Path, state: State) -> None:
    """Bytes between the last record and the directory."""
    write_zip(path, _stored(state))
    raw = bytearray(path.read_bytes())
    start = int.from_bytes(raw[-6:-2], 'little')
    struct.pack_into('<I', raw, len(raw) - 6, start + 100)
    path.write_bytes(raw[:start] + bytes(100) + raw[start:])


def _field(path: Path, state: State) -> None:
    """An extra field in the directory that is not zip64's."""
    with zipfile.ZipFile(path, 'w') as archive:
        for entry, content in _stored(state).items():
            info = zipfile.ZipInfo(f'archive/{entry}')
            info.extra = struct.pack('<2H', 0x7075, 4) + b'evil'
            archive.writestr(info, content)


def _pickles_end(raw: bytes, count: int) -> int:
    stream = io.BytesIO(raw)
    for _ in range(count):
        for _ in pickletools.genops(stream):
            pass
    return stream.tell()


def _last_pickle(raw: bytes, content: bytes) -> bytes:
    """Another list of storages in the old format."""
    return raw[: _pickles_end(raw, 4)] + b'\x80\x02' + content + STOP + raw[_pickles_end(raw, 5) :]


def _other_length(raw: bytes) -> bytes:
    """The first storage of the old format is preceded by a gigantic length."""
    at = _pickles_end(raw, 5)
    return raw[:at] + struct.pack('<q', 1 << 60) + raw[at + 8 :]


def _plain_pickle(path: Path, state: State) -> None:
    path.write_bytes(b'\x80\x02' + FRAGMENTS['os.system'] + STOP)


def _stream_storage(raw: bytes) -> bytes:
    """The first storage claims gigabytes."""
    at = raw.find(b'cpu', raw.find(b'storage')) + 5  # after the string and its memo opcode: the count
    return raw[:at] + number(0x7FFFFFFF) + raw[at + {b'K': 2, b'M': 3, b'J': 5}[raw[at : at + 1]] :]


def _safetensors(header: object, data: bytes = bytes(16), length: int | None = None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    return lambda path, state: path.write_bytes(struct.pack('<Q', size) + raw + data)


def _entry(shape: list, *offsets: int, dtype: str = 'F32') -> dict:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': list(offsets)}


FILES: dict[str, Callable[[Path, State], object]] = {
    'deflated.pth': _zip(deflate=True),
    'deflate bomb.pth': _deflate_bomb,
    'overlapping.pth': _overlapping,
    'absolute path.pth': _zip(lambda records: records | {'data/0': b''}, folder='/archive/'),
    'parent path.pth': _zip(lambda records: records | {'../../evil': b'x'}),
    'backslash path.pth': _zip(lambda records: records | {'..\\evil': b'x'}),
    'two data.pkl.pth': _zip(lambda records: records | {'data.pkl#2': b'\x80\x02}.'}),
    'two spellings.pth': _zip(lambda records: records | {'DATA.PKL': b'\x80\x02}.'}),
    'thousands of records.pth': _zip(lambda records: records | {f'data/x{i}': b'' for i in range(70_000)}),
    'no data.pkl.pth': _zip(lambda records: {key: value for key, value in records.items() if key != 'data.pkl'}),
    'encrypted.pth': _zip_patched(b'PK\x01\x02', 8, b'\x01\x08'),
    'folder flag.pth': _zip_patched(b'PK\x01\x02', 38, b'\x10\x00\x00\x00'),
    'directory elsewhere.pth': _zip_patched(b'PK\x05\x06', 16, struct.pack('<I', 0)),
    'directory too long.pth': _zip_patched(b'PK\x05\x06', 12, struct.pack('<I', 0xFFFFFFFE)),
    'too few records.pth': _zip_patched(b'PK\x05\x06', 8, struct.pack('<HH', 1, 1)),
    'size in the directory.pth': _zip_patched(b'PK\x01\x02', 20, struct.pack('<II', 0x7FFFFFFF, 0x7FFFFFFF)),
    'zip64 size.pth': _zip_patched(b'PK\x01\x02', 20, struct.pack('<II', 0xFFFFFFFF, 0xFFFFFFFF)),
    'checksum.pth': _zip_patched(b'PK\x01\x02', 16, b'\xde\xad\xbe\xef'),
    'prepended.pth': _prepended,
    'comment.pth': lambda path, state: (write_zip(path, _stored(state)), path.write_bytes(path.read_bytes() + b'x')),
    'torchscript.pth': _torchscript,
    'tar.pth': _tar,
    'plain pickle.pth': _plain_pickle,
    'stream, cut.pth': _stream(lambda raw: raw[:-1]),
    'stream, longer.pth': _stream(lambda raw: raw + b'x'),
    'stream, text of gigabytes.pth': _stream(lambda raw: raw.replace(text('model'), b'X\xff\xff\xff\xffmodel', 1)),
    'stream, other keys.pth': _stream(lambda raw: _last_pickle(raw, LIST + text('x') + b'a')),
    'stream, no keys.pth': _stream(lambda raw: _last_pickle(raw, number(1))),
    'stream, other length.pth': _stream(_other_length),
    'bytes of no record.pth': _gap,
    'zip64 end.pth': lambda path, state: (torch.save(state, path), _patched(path, b'PK\x06\x07', 8, b'\1')),
    'field of the directory.pth': _field,
    'header of a record.pth': _zip_patched(b'PK\x03\x04', 0, b'PK\x03\x05'),
    'name in a header.pth': _zip_patched(b'PK\x03\x04', 30, b'X'),
    'directory of noise.pth': _zip_patched(b'PK\x01\x02', 0, b'XXXX'),
    'stream, tar inside.pth': _stream(lambda raw: raw[:257] + b'ustar\x0000' + raw[265:]),
    'stream, storage.pth': _stream(_stream_storage),
    'header longer than the file.safetensors': _safetensors({}, length=1 << 20),
    'header of petabytes.safetensors': _safetensors({}, length=1 << 50),
    'overlapping.safetensors': _safetensors({'a': _entry([4], 0, 16), 'b': _entry([4], 0, 16)}),
    'hole.safetensors': _safetensors({'a': _entry([1], 0, 4), 'b': _entry([1], 12, 16)}),
    'gigantic shape.safetensors': _safetensors({'a': _entry([10**9, 10**9], 0, 16)}),
    'overflowing shape.safetensors': _safetensors({'a': _entry([1 << 32, 1 << 32], 0, 0)}, b''),
    'negative shape.safetensors': _safetensors({'a': _entry([-4], 0, 16)}),
    'beyond the end.safetensors': _safetensors({'a': _entry([8], 0, 32)}),
    'unknown type.safetensors': _safetensors({'a': _entry([4], 0, 16, dtype='O8')}),
    'metadata of numbers.safetensors': _safetensors({'__metadata__': {'a': 1}, 'a': _entry([4], 0, 16)}),
    'metadata nested.safetensors': _safetensors({'__metadata__': {'a': {'b': 'c'}}, 'a': _entry([4], 0, 16)}),
    'key with escapes.safetensors': _safetensors({'\x1b[2J': _entry([10**9], 0, 16)}),
    'nested header.safetensors': _safetensors(b'[' * 1_000_000, b''),
    'million keys.safetensors': _safetensors({f'k{i}': _entry([0], 0, 0) for i in range(400_000)}, b''),
    'duplicate key.safetensors': _safetensors(
        json.dumps({'a': _entry([2], 0, 8), 'b': _entry([4], 0, 16)}).replace('"b"', '"a"').encode(), bytes(24)
    ),
    'fifo.pth': lambda path, state: os.mkfifo(path),
    'folder.pth': lambda path, state: path.mkdir(),
    'zero device.pth': lambda path, state: path.symlink_to('/dev/zero'),
    'zero device.safetensors': lambda path, state: path.symlink_to('/dev/zero'),
    'loop.pth': lambda path, state: path.symlink_to(path),
    'dangling.pth': lambda path, state: path.symlink_to('nowhere'),
    'own memory.pth': lambda path, state: path.symlink_to('/proc/self/mem'),
    'new\nline \x1b[31m.pth': lambda path, state: path.write_bytes(b'hello'),
}  # fmt: skip


def write_corpus(folder: Path, state: State) -> tuple[list[str], list[str]]:
    """Write all files.

    Returns:
        Names of those that must be refused, and of those that must load.
    """
    refused, harmless = [], []
    for index, (title, fragment) in enumerate(FRAGMENTS.items()):
        refused.append(f'pickle {index} {"".join(c for c in title if c.isalnum() or c == " ")}.pth')
        write_zip(folder / refused[-1], with_fragment(state, fragment, x=bytes(16)))
    for title, change in SAVED.items():
        refused.append(f'saved {title}.pth')
        torch.save(change(state), folder / refused[-1])
    for title, write in FILES.items():
        refused.append(title)
        write(folder / title, state)
    for title, change in HARMLESS.items():
        harmless.append(f'harmless {title}.pth')
        torch.save(change(state), folder / harmless[-1])
    harmless.append('harmless stream.pth')
    torch.save({'model': state}, folder / harmless[-1], _use_new_zipfile_serialization=False)
    return refused, harmless
