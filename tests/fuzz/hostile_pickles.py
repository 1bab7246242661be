"""Opcodes of hostile pickles; each creates one value, which is added to a valid checkpoint."""

from __future__ import annotations

import pickle
import struct

# Protocol 2, as torch.save writes it.
MARK, STOP, REDUCE, BUILD, NEWOBJ, TUPLE, PERSID = b'(', b'.', b'R', b'b', b'\x81', b't', b'Q'
DICT, LIST, EMPTY = b'}', b']', b')'


def text(value: str) -> bytes:
    """A string."""
    raw = value.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(raw)) + raw


def number(value: int) -> bytes:
    """An integer."""
    if -(1 << 31) <= value < 1 << 31:
        return b'J' + struct.pack('<i', value)
    raw = pickle.encode_long(value)
    return b'\x8a' + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    """A global."""
    return f'c{module}\n{attribute}\n'.encode()


def group(*items: bytes) -> bytes:
    """A tuple."""
    return MARK + b''.join(items) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    """The result of a function."""
    return function + group(*arguments) + REDUCE


def keep(index: int) -> bytes:
    """Memoize the top of the stack."""
    return b'r' + struct.pack('<I', 1000 + index)


def again(index: int) -> bytes:
    """Push a memoized value."""
    return b'j' + struct.pack('<I', 1000 + index)


BOMB = (
    EMPTY + b''.join(keep(i) + again(i) + b'\x86' for i in range(60)) + keep(99)
)  # 2^60 items for code that visits them all
FALSE, NONE = b'\x89', b'N'
REBUILD = name('torch._utils', '_rebuild_tensor')
CONJUGATED = DICT + text('conj') + b'\x88s'
SIZE = name('torch', 'Size')
ODD = [number(-1), number(-1), number(63)]  # flags of a numpy type
ORDERED = name('collections', 'OrderedDict') + EMPTY + REDUCE
HISTORY = name('mmengine.logging.history_buffer', 'HistoryBuffer')
ARRAY = name('numpy.core.multiarray', '_reconstruct')


def storage(kind: str, key: str, count: int) -> bytes:
    """A storage of the zip format."""
    return group(text('storage'), name('torch', kind), text(key), text('cpu'), number(count)) + PERSID


def tensor(
    source: bytes, offset: int, sizes: tuple, strides: tuple, hooks: bytes = ORDERED, last: bytes = b''
) -> bytes:
    """A tensor, with any numbers."""
    shape, steps = (group(*map(number, values)) for values in (sizes, strides))
    return call(name('torch._utils', '_rebuild_tensor_v2'), source, number(offset), shape, steps, FALSE, hooks, last)


def numpy_type(kind: str, *state: bytes) -> bytes:
    """A numpy type with its state."""
    made = call(name('numpy', 'dtype'), text(kind), FALSE, b'\x88')
    return made + (group(*state) + BUILD if state else b'')


FLOAT = numpy_type('f8', number(3), text('<'), NONE, NONE, NONE, number(-1), number(-1), number(0))


def numpy_array(dtype: bytes, shape: int, content: bytes) -> bytes:
    """A numpy array with its state."""
    made = call(
        ARRAY, name('numpy', 'ndarray'), group(number(0)), call(name('_codecs', 'encode'), text('b'), text('latin1'))
    )
    return made + group(number(1), group(number(shape)), dtype, FALSE, content) + BUILD


def encoded(content: str, encoding: str = 'latin1') -> bytes:
    """Bytes, as in protocol 2."""
    return call(name('_codecs', 'encode'), text(content), text(encoding))


COMMAND = 'touch ran'
FRAGMENTS: dict[str, bytes] = {
    'os.system': call(name('os', 'system'), text(COMMAND)),
    'posix.system': call(name('posix', 'system'), text(COMMAND)),
    'subprocess': call(name('subprocess', 'Popen'), text(COMMAND)),
    'eval': call(name('builtins', 'eval'), text("open('ran', 'w')")),
    'exec of Python 2': call(name('__builtin__', 'exec'), text("open('ran', 'w')")),
    'getattr chain': call(
        call(name('builtins', 'getattr'), call(name('builtins', '__import__'), text('os')), text('system')),
        text(COMMAND),
    ),
    'getattr of a function': call(name('builtins', 'getattr'), REBUILD, text('__globals__')),
    'getattr of HistoryBuffer': call(name('builtins', 'getattr'), HISTORY, text('__init__')),
    'reducer in a reducer': call(call(name('operator', 'attrgetter'), text('system')), name('os', 'path')),
    'a class that is called': call(name('torch.nn.modules.linear', 'Linear'), number(2), number(2)),
    'torch.load inside': call(name('torch.serialization', 'load'), text('other.pth')),
    'INST': MARK + text(COMMAND) + b'ios\nsystem\n',
    'OBJ': MARK + name('os', 'system') + text(COMMAND) + b'o',
    'NEWOBJ_EX': name('collections', 'OrderedDict') + EMPTY + DICT + b'\x92',
    'STACK_GLOBAL': text('os') + text('system') + b'\x93' + group(text(COMMAND)) + REDUCE,
    'EXT1': b'\x82\x01',
    'persistent id that is text': text('storage') + PERSID,
    'persistent id of a module': group(text('module'), SIZE, text('/etc/passwd'), text('')) + PERSID,
    'class of its state': ORDERED + DICT + text('__class__') + SIZE + b's' + BUILD,
    'method hidden by state': ORDERED + DICT + text('get') + SIZE + b's' + BUILD,
    'metadata of numbers': ORDERED + DICT + text('_metadata') + number(1) + b's' + BUILD,
    'numpy array of an odd kind': call(ARRAY, name('numpy', 'ndarray'), group(number(0)), EMPTY),
    'CfgNode with hidden method': name('yacs.config', 'CfgNode') + EMPTY + NEWOBJ
    + DICT + text('items') + NONE + b's' + BUILD,
    'Namespace with hidden method': name('argparse', 'Namespace') + EMPTY + NEWOBJ
    + DICT + text('__class__') + SIZE + b's' + BUILD,
    'Namespace called': call(name('argparse', 'Namespace')),
    'HistoryBuffer with other statistics': HISTORY + EMPTY + NEWOBJ + DICT + text('statistics_methods')
    + DICT + text('mean') + SIZE + b's' + b's' + BUILD,
    'HistoryBuffer with exchanged statistics': HISTORY + EMPTY + NEWOBJ + DICT + text('statistics_methods')
    + DICT + text('mean') + call(name('builtins', 'getattr'), HISTORY, text('max')) + b's' + b's' + BUILD,
    'HistoryBuffer called': call(HISTORY, LIST, LIST, number(1)),
    'numpy objects': numpy_array(
        numpy_type('O', number(3), text('|'), NONE, NONE, NONE, *ODD), 1, LIST + text('x') + b'a'
    ),
    'numpy type with flags': numpy_array(
        numpy_type('f8', number(3), text('<'), NONE, NONE, NONE, *ODD), 1, encoded('A' * 8)
    ),
    'numpy type not copied': call(name('numpy', 'dtype'), text('f8'), FALSE, FALSE),
    'numpy type of gigabytes': numpy_type('V2000000000'),
    'numpy type of fields': call(name('numpy', 'dtype'), LIST + group(text('a'), text('O')) + b'a', FALSE, b'\x88'),
    'numpy array of terabytes': call(ARRAY, name('numpy', 'ndarray'), group(number(1 << 40)), encoded('d')),
    'numpy array called': call(name('numpy', 'ndarray'), group(number(1 << 40))),
    'numpy array beyond its bytes': numpy_array(FLOAT, 1 << 40, encoded('A' * 8)),
    'numpy array of a negative size': numpy_array(FLOAT, -1, encoded('A' * 8)),
    'numpy number beyond its bytes': call(name('numpy._core.multiarray', 'scalar'), FLOAT, encoded('A')),
    'bytearray of terabytes': call(name('builtins', 'bytearray'), number(1 << 40)),
    'tensor class called': call(name('torch', 'FloatTensor'), number(1 << 40)),
    'old tensor with state': name('torch', 'Tensor') + EMPTY + NEWOBJ + group(number(1 << 40)) + BUILD,
    'one text encoded over and over': text('A' * 1_000_000) + keep(0) + LIST
    + call(name('_codecs', 'encode'), again(0), text('latin1')) * 3000 + b'a' * 2999 + b'a',
    'UTF-32': encoded('A', 'utf-32'),
    'bomb of tuples as key': group(BOMB, DICT + again(99) + NONE + b's'),
    'bomb of tuples in a set': group(BOMB, call(name('builtins', 'set'), LIST + again(99) + b'a')),
    'bomb of tuples as numpy type': group(BOMB, call(name('numpy', 'dtype'), again(99), FALSE, b'\x88')),
    'nesting': EMPTY + b'\x85' * 20_000,
    'nesting of lists': LIST * 10_000 + b'a' * 9_999,
    'nesting from above': LIST + LIST + keep(0) + b'a' + again(0) + LIST + b'a' + b'\x86',
    'list in itself': LIST + keep(0) + again(0) + b'a',
    'marks': MARK * 20_000,
    'LONG4 of gigabytes': b'\x8b' + struct.pack('<i', 2_000_000_000),
    'digits': b'L' + b'9' * 1_000_000 + b'L\n',
    'text of gigabytes': b'X' + struct.pack('<I', 4_000_000_000),
    'many sets': b'\x8f' * 110_000,
    'many dicts': DICT * 110_000,
    'integers of one hash': DICT + MARK + b''.join(number(((1 << 61) - 1) * i) + NONE for i in range(1, 30_000)) + b'u',
    'storage that is not there': tensor(storage('FloatStorage', '999', 4), 0, (4,), (1,)),
    'storage of another size': tensor(storage('FloatStorage', 'x', 1 << 40), 0, (4,), (1,)),
    'storage read beyond its end': tensor(storage('FloatStorage', 'x', 5), 0, (5,), (1,)),
    'storage of negative size': tensor(storage('FloatStorage', 'x', -1), 0, (1,), (1,)),
    'storage outside the data': tensor(storage('ByteStorage', '../data.pkl', 4), 0, (4,), (1,)),
    'storage of two sizes': group(storage('FloatStorage', 'x', 4), storage('ByteStorage', 'x', 16)),
    'storage of no type': tensor(storage('QInt8Storage', 'x', 16), 0, (4,), (1,)),
    'tensor beyond its storage': tensor(storage('FloatStorage', 'x', 4), 0, (5,), (1,)),
    'tensor beyond by stride': tensor(storage('FloatStorage', 'x', 4), 0, (2,), (1 << 40,)),
    'tensor beyond by offset': tensor(storage('FloatStorage', 'x', 4), 4, (1,), (1,)),
    'tensor before its storage': tensor(storage('FloatStorage', 'x', 4), -1, (1,), (1,)),
    'tensor with negative size': tensor(storage('FloatStorage', 'x', 4), 0, (-1,), (1,)),
    'tensor with negative stride': tensor(storage('FloatStorage', 'x', 4), 3, (4,), (-1,)),
    'tensor without end': tensor(storage('FloatStorage', 'x', 4), 0, (10**6, 10**6), (0, 0)),
    'tensor of overflowing size': tensor(storage('FloatStorage', 'x', 4), 0, (1 << 61, 1 << 61), (0, 0)),
    'tensor of many dimensions': tensor(storage('FloatStorage', 'x', 4), 0, (1,) * 1000, (1,) * 1000),
    'tensor with a hook': tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,), ORDERED + number(0) + SIZE + b's'),
    'tensor with a hook to come': ORDERED + keep(0) + tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,), again(0))
    + again(0) + number(0) + SIZE + b's' + b'\x86',
    'tensor that is conjugated': tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,), last=CONJUGATED),
    'tensor of a subclass': call(name('torch._tensor', '_rebuild_from_type_v2'), REBUILD, SIZE, EMPTY, DICT),
    'parameter with hidden method': call(
        name('torch._utils', '_rebuild_parameter_with_state'),
        tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,)), FALSE, ORDERED, DICT + text('clone') + SIZE + b's',
    ),
    'number that is called': number(1) + EMPTY + REDUCE,
    'state of a number': number(1) + DICT + BUILD,
    'state of a size': tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,)) + group(number(1)) + BUILD,
    'numpy array of listed objects': numpy_array(FLOAT, 1, LIST + text('x') + b'a'),
    'Counter of a bomb': group(BOMB, call(name('collections', 'Counter'), LIST + again(99) + b'a')),
    'device with escapes': call(name('torch', 'device'), text('\x1b[2J')),
    'complex of text': call(name('builtins', 'complex'), text('1'), text('1')),
    'storage of a class': group(text('storage'), SIZE, text('x'), text('cpu'), number(4)) + PERSID,
    'tensor of a number': tensor(number(1), 0, (4,), (1,)),
    'tensor of an odd type': call(
        name('torch._utils', '_rebuild_tensor_v3'), storage('ByteStorage', 'x', 16), number(0), group(number(1)),
        group(number(1)), FALSE, ORDERED, SIZE,
    ),
    'tensor beyond by its type': call(
        name('torch._utils', '_rebuild_tensor_v3'), storage('ByteStorage', 'x', 16), number(0), group(number(16)),
        group(number(1)), FALSE, ORDERED, name('torch', 'int64'),
    ),
    'parameter of a number': call(name('torch._utils', '_rebuild_parameter'), number(1), FALSE, ORDERED),
    'parameter with a list': call(
        name('torch._utils', '_rebuild_parameter_with_state'),
        tensor(storage('FloatStorage', 'x', 4), 0, (4,), (1,)), FALSE, ORDERED, LIST,
    ),
    'byte string of Python 2': b'U\x02\xff\xfe',
    'name with terminal escapes': call(name('\x1b[2Jevil', 'a\x07b'), number(1)),
}  # fmt: skip
