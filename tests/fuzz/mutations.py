"""Valid checkpoints of every format, and random mutations of their bytes, records, opcodes and headers."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

import torch
from mmengine.logging import HistoryBuffer

INTEGERS = (0, 1, 2, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
OPCODES = [opcode.code.encode('latin1') for opcode in pickletools.opcodes]
JSON_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    1 << 40,
    1 << 63,
    1 << 64,
    1.5,
    '',
    'F32',
    'F64',
    'BOOL',
    'U8',
    [],
    [1],
    {},
    {'a': 'b'},
)

Mutation = Callable[[random.Random, bytes], bytes]


def write_seeds(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A valid file of each format."""
    from safetensors.torch import save

    full = {
        'state_dict': {f'backbone.{key}': value for key, value in state.items()},
        'message_hub': {'loss': HistoryBuffer([0.5, 0.25], [1, 1])},
        'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
        'meta': {'seed': 3, 'raw': b'bytes', 'size': torch.Size([1, 2])},
    }
    return {
        'zip': _saved(full),
        'stream': _saved({'model': state, 'epoch': 3}, _use_new_zipfile_serialization=False),
        'safetensors': save(state, metadata={'format': 'pt'}),
    }


def _saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flip, overwrite, insert, remove, repeat or truncate; most often near the ends, where the structures are."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        length = max(len(changed), 1)
        at = rng.choice(
            (rng.randrange(length), rng.randrange(min(length, 4096)), max(0, length - 1 - rng.randrange(12000)))
        )
        at = min(at, length - 1)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice(('<B', '<H', '<I', '<Q'))
            value = struct.pack(width, rng.choice(INTEGERS) % (1 << (8 * struct.calcsize(width))))
            changed[at : at + len(value)] = value
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            end = at + rng.randrange(1, 200)
            changed[at:at] = changed[at:end]
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def change_opcodes(rng: random.Random, pickled: bytes, fragments: list[bytes] = []) -> bytes:  # noqa: B006
    """Replace, repeat, remove or swap opcodes or their arguments, or insert a hostile fragment."""
    try:
        starts = [position for _, _, position in pickletools.genops(pickled)]
    except Exception:
        return change_bytes(rng, pickled)
    pieces = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        kind = rng.randrange(7)
        if kind == 0:
            pieces[at] = rng.choice(OPCODES) + pieces[at][1:]
        elif kind == 1 and len(pieces[at]) > 1:
            size = len(pieces[at]) - 1
            value = struct.pack('<Q', rng.choice(INTEGERS) % (1 << 63)).ljust(size, b'\xff')[:size]
            pieces[at] = pieces[at][:1] + (value if rng.random() < 0.5 else rng.randbytes(size))
        elif kind == 2:
            pieces.insert(at, pieces[rng.randrange(len(pieces))])
        elif kind == 3 and len(pieces) > 2:
            del pieces[at]
        elif kind == 4:
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif kind == 5:
            end = min(len(pieces), at + rng.randrange(1, 30))
            pieces[at:at] = pieces[at:end]
        elif fragments:
            pieces.insert(at, rng.choice(fragments))
    return b''.join(pieces)


def change_records(rng: random.Random, raw: bytes, fragments: list[bytes]) -> bytes:
    """Change the pickle or the records of a zip file, and write it again with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = [[name, archive.read(name)] for name in archive.namelist()]
    pickle = next(record for record in records if record[0].endswith('/data.pkl'))
    kind = rng.randrange(8)
    if kind < 5:
        pickle[1] = change_opcodes(rng, pickle[1], fragments)
    elif kind == 5:
        pickle[1] = change_bytes(rng, pickle[1])
    elif kind == 6:
        record = rng.choice(records)
        record[1] = change_bytes(rng, record[1])
    else:
        record = rng.choice(records)
        record[0] = rng.choice((rng.choice(records)[0], record[0].upper(), record[0] + '\0', '../' + record[0], 'x'))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def change_stream(rng: random.Random, raw: bytes, fragments: list[bytes]) -> bytes:
    """Change the fourth pickle of the format before 1.6, which is the content."""
    stream = io.BytesIO(raw)
    for _ in range(3):
        for _ in pickletools.genops(stream):
            pass
    start = stream.tell()
    for _ in pickletools.genops(stream):
        pass
    end = stream.tell()
    return raw[:start] + change_opcodes(rng, raw[start:end], fragments) + raw[end:]


def change_header(rng: random.Random, raw: bytes) -> bytes:
    """Change the header of a safetensors file, as JSON, and its length with it."""
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8 : 8 + size])
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(header))
        kind = rng.randrange(6)
        if kind == 0:
            header[name] = rng.choice(JSON_VALUES)
        elif kind == 1:
            header[rng.choice(('', 'x/../y', '\x1b[2J', '__metadata__', 'é' * 300))] = header[name]
        elif kind == 2:
            del header[name]
            if not header:
                break
        elif isinstance(header[name], dict) and header[name]:
            field = rng.choice(list(header[name]))
            value = header[name][field]
            if isinstance(value, list) and value and rng.random() < 0.8:
                value[rng.randrange(len(value))] = rng.choice(JSON_VALUES)
            else:
                header[name][field] = rng.choice(JSON_VALUES)
    text = json.dumps(header).encode()
    if rng.random() < 0.3:
        text = change_bytes(rng, text)
    length = len(text) if rng.random() < 0.9 else rng.choice(INTEGERS)
    return struct.pack('<Q', length) + text + raw[8 + size :]


def mutate(rng: random.Random, seeds: dict[str, bytes], fragments: list[bytes]) -> tuple[str, bytes]:
    """A suffix, and a mutated file of that format."""
    kind = rng.choice(('zip bytes', 'zip records', 'zip records', 'stream bytes', 'stream', 'st bytes', 'st'))
    if kind == 'zip bytes':
        return '.pth', change_bytes(rng, seeds['zip'])
    if kind == 'zip records':
        return '.pth', change_records(rng, seeds['zip'], fragments)
    if kind == 'stream bytes':
        return '.pth', change_bytes(rng, seeds['stream'])
    if kind == 'stream':
        return '.pth', change_stream(rng, seeds['stream'], fragments)
    if kind == 'st bytes':
        return '.safetensors', change_bytes(rng, seeds['safetensors'])
    return '.safetensors', change_header(rng, seeds['safetensors'])
