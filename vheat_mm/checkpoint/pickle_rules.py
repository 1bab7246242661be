"""What a checkpoint's pickle may create: containers, numbers, strings, and tensors that lie within their storages."""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, cast

import torch

from vheat_mm.checkpoint.pickle_inspector import Name, PickleInspector, Tuple, Value, is_kind
from vheat_mm.checkpoint.zip_layout import Record
from vheat_mm.utils.errors import CheckpointError

SPARE_BYTES = 1 << 29  # for tensors that repeat their storage, such as ``zeros(1).expand(...)``
_MAX_LINE = 1000  # bytes of the name of a module or class

_STORAGES = {
    'Float': 4, 'Double': 8, 'Half': 2, 'BFloat16': 2, 'Byte': 1, 'Char': 1, 'Short': 2, 'Int': 4, 'Long': 8,
    'Bool': 1, 'ComplexFloat': 8, 'ComplexDouble': 16,
}  # fmt: skip
STORAGE_SIZES = {f'torch.{kind}Storage': size for kind, size in _STORAGES.items()} | {
    'torch.storage.UntypedStorage': 1,
    'torch.UntypedStorage': 1,
}
_DTYPE = re.compile(r'torch\.((?:b?float|complex|u?int)(?:8|16|32|64|128)(?:_\w+)?|bool)$')
_NUMBERS = {'b1': 1, 'i1': 1, 'u1': 1, 'i2': 2, 'u2': 2, 'f2': 2, 'i4': 4, 'u4': 4, 'f4': 4, 'i8': 8, 'u8': 8, 'f8': 8}
_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_HISTORY_STATE = {'max_length', '_log_history', '_count_history', 'statistics_methods', '_statistics_methods'}


def inspect_pickles(
    stream: IO[bytes], name: str, length: int, records: dict[str, Record] | None = None
) -> dict[str, Value]:
    """Refuse a checkpoint whose pickles create anything but tensors and plain values; no object is created.

    Args:
        stream: At the start of the first pickle; read to the end of the last.
        name: The file, named in errors.
        length: Length of the file in bytes.
        records: Records of a zip file, which has one pickle; ``None`` for PyTorch's format before 1.6.

    Returns:
        The storages that its tensors use, for a stream in the order in which they follow its pickles.

    Raises:
        CheckpointError: A pickle is corrupt, or creates an object that is not allowed.
    """
    inspector = CheckpointInspector(name, records, length)
    if records is not None:
        inspector.read(stream)
        return inspector.storages
    bounded = cast(IO[bytes], _Bounded(stream, length))
    for _ in range(4):  # magic number, version, platform, content
        inspector.read(bounded)
    keys = inspector.read_names(bounded)
    if sorted(keys) != sorted(inspector.storages):
        inspector.refuse('the storages after its pickles are not those that its tensors use')
    return {key: inspector.storages[key] for key in keys}


class _Bounded:
    """A file that reads no more bytes than it has: Python allocates memory for all bytes that are asked for."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self.file, self.length, self.tell = file, length, file.tell

    def read(self, size: int) -> bytes:
        return self.file.read(min(size, self.length - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(_MAX_LINE)


class CheckpointInspector(PickleInspector):
    """The rules for pickles of a checkpoint."""

    def __init__(self, name: str, records: dict[str, Record] | None, length: int) -> None:
        super().__init__(name, records, length)
        self.storages: dict[str, Value] = {}
        self.copied = 0  # bytes of strings and arrays that are copied
        self.storage_bytes = 0
        self.tensor_bytes = 0
        self.functions: dict[str, Callable[..., Any]] = {
            'collections.OrderedDict': lambda: Value('ordered'),
            'collections.Counter': self._counter,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor_v2,
            'torch._utils._rebuild_tensor_v3': self._tensor_v3,
            'torch._utils._rebuild_parameter': self._parameter,
            'torch._utils._rebuild_parameter_with_state': self._parameter,
            'torch.Size': self._shape,
            'torch.device': self._device,
            '_codecs.encode': self._bytes,
            'builtins.bytearray': self._bytes,
            'builtins.bytes': lambda: Value('bytes'),  # empty
            'builtins.set': self._set,
            'builtins.complex': self._complex,
            'builtins.getattr': self._method,
            'numpy.dtype': self._dtype,
        }
        for core in ('numpy.core', 'numpy._core'):
            self.functions[f'{core}.multiarray._reconstruct'] = self._array
            self.functions[f'{core}.multiarray.scalar'] = self._scalar
        self.classes = {_HISTORY: 'history', 'yacs.config.CfgNode': 'ordered', 'argparse.Namespace': 'namespace'}
        self.known = {*self.functions, *self.classes, *STORAGE_SIZES, 'numpy.ndarray'}
        self.trusted = _trusted_by_the_user() - self.known

    def find(self, argument: str) -> Name:
        module, _, name = argument.partition(' ')
        text = f'{"builtins" if module == "__builtin__" else module}.{name}'
        if text in self.known or text in self.trusted or _DTYPE.match(text):
            return Name(text)
        raise CheckpointError(
            f'{self.name!r} was refused: it holds {text[:200]!r}, which is neither a plain tensor nor on the list of '
            'allowed classes, and loading it could run code. Ask its author for a file of tensors only.'
        )

    def call(self, function: Any, arguments: Any, opcode: str) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, Tuple):
            self.refuse('it calls an object that is not a class or function')
        if function.text in self.classes and opcode == 'NEWOBJ' and not arguments:
            return Value(self.classes[function.text])
        if function.text in self.functions and opcode == 'REDUCE':
            return self.functions[function.text](*arguments)
        if function.text in self.trusted:
            return Value('trusted')
        return self.refuse(f'it calls {function.text!r} with {len(arguments)} arguments, which no checkpoint needs')

    def build(self, target: Any, state: Any) -> None:
        if not isinstance(target, Value) or target.closed:
            self.refuse('it sets the state of an object that is complete or has none')
        if target.kind == 'ordered' and _is_dict(state):
            self._check_attributes(OrderedDict, state)
            metadata = state.items.get('_metadata', Value('dict'))
            if not _is_dict(metadata) or not all(_is_dict(entry) for entry in metadata.items.values()):
                self.refuse('the _metadata of its weights is not a dict of dicts')
        elif target.kind == 'namespace' and _is_dict(state):
            self._check_attributes(argparse.Namespace, state)
        elif target.kind == 'history' and _is_dict(state) and state.items.keys() <= _HISTORY_STATE:
            methods = [state.items[key] for key in state.items if key.endswith('statistics_methods')]
            if not all(_is_dict(method) and _is_own(method.items) for method in methods):
                self.refuse('it replaces the statistics of HistoryBuffer')
        elif target.kind == 'dtype':
            order = state[1] if isinstance(state, Tuple) and len(state) == 8 else None
            if order not in ('<', '|', '=') or state[0] != 3 or tuple(state[2:]) != (None, None, None, -1, -1, 0):
                self.refuse('it holds a numpy dtype that is not a plain little-endian number')
        elif target.kind == 'array':
            _, shape, dtype, _, content = state
            if not is_kind(dtype, 'dtype') or not is_kind(content, 'bytes'):
                self.refuse('it holds a numpy array of objects')
            if math.prod(self._integers(shape)) * dtype.size != content.size:
                self.refuse('it holds a numpy array with more or fewer bytes than its shape needs')
            self._copy(content.size)
        elif target.kind != 'trusted':
            self.refuse(f'it sets the state of a {target.kind}')

    def _check_attributes(self, owner: type, state: Value) -> None:
        hidden = [key for key in state.items if not isinstance(key, str) or hasattr(owner, key)]
        if hidden:
            self.refuse(f'it replaces the attribute {str(hidden[0])[:50]!r} of {owner.__name__}')

    def _copy(self, size: int) -> None:
        self.copied += size
        if self.copied > 4 * self.length:  # to bytes and to an array
            self.refuse('it copies more bytes than the file has')

    def _counter(self, counts: Any = None) -> Value:
        if counts is not None and not _is_dict(counts):
            self.refuse('it holds a Counter that is not made from a dict')
        return Value('counter')

    def _shape(self, sizes: Any) -> Tuple:
        self._integers(sizes)
        return sizes

    def _device(self, kind: Any, index: Any = None) -> Value:
        if not isinstance(kind, str) or not re.match(r'[a-z]{1,20}$', kind) or not isinstance(index, int | None):
            self.refuse('it holds an invalid torch.device')
        return Value('device')

    def _bytes(self, text: Any = '', encoding: Any = 'latin1') -> Value:
        if isinstance(text, str) and encoding in ('latin1', 'latin-1'):
            size = len(text)
        elif is_kind(text, 'bytes'):
            size = text.size
        else:
            self.refuse('it creates bytes from an object that is not a string')
        self._copy(size)
        return Value('bytes', size)

    def _set(self, values: Any = None) -> Value:
        if values is not None and not (is_kind(values, 'list') and values.hashable):
            self.refuse('it holds a set of other objects than strings and small integers')
        return Value('set')

    def _complex(self, real: Any, imaginary: Any) -> Value:
        if not isinstance(real, float) or not isinstance(imaginary, float):
            self.refuse('it holds a complex number that is not made from two floats')
        return Value('complex')

    def _method(self, owner: Any, name: Any) -> Value:
        if getattr(owner, 'text', None) != _HISTORY or name not in ('min', 'max', 'mean', 'current'):
            self.refuse('it calls getattr')
        return Value('method', items={name: owner})

    # --- numpy

    def _dtype(self, kind: Any, align: Any = False, copy: Any = False) -> Value:
        if not isinstance(kind, str) or kind not in _NUMBERS or (align, copy) != (False, True):
            self.refuse('it holds numpy values that are not plain numbers')
        return Value('dtype', _NUMBERS[kind])

    def _array(self, owner: Any, shape: Any, kind: Any) -> Value:
        plain = is_kind(kind, 'bytes') or isinstance(kind, str)
        if getattr(owner, 'text', None) != 'numpy.ndarray' or shape != (0,) or not plain:
            self.refuse('it creates a numpy array in an unusual way')
        return Value('array')

    def _scalar(self, dtype: Any, content: Any) -> Value:
        if not is_kind(dtype, 'dtype') or not is_kind(content, 'bytes') or dtype.size != content.size:
            self.refuse('it holds a numpy number with more or fewer bytes than it needs')
        return Value('number')

    # --- tensors

    def _integers(self, values: Any) -> list[int]:
        if not isinstance(values, Tuple) or len(values) > 64:
            self.refuse('it holds a tensor with an invalid shape')
        if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            self.refuse('it holds a tensor whose shape, strides or offset are not valid numbers of elements')
        return list(values)

    def storage(self, key: Any) -> Value:
        if not isinstance(key, Tuple) or len(key) != (6 if self.records is None else 5) or key[0] != 'storage':
            self.refuse('it holds a persistent id that is not of a storage')
        _, kind, name, _, count = key[:5]
        unit = STORAGE_SIZES.get(getattr(kind, 'text', ''))
        self._integers(Tuple([count]))
        if unit is None or not isinstance(name, str) or (self.records is None and key[5] is not None):
            self.refuse('it holds a storage of unknown type')
        size = count * unit
        if name in self.storages:
            known = self.storages[name]
            if (known.size, known.unit) != (size, unit):
                self.refuse(f'storage {name[:50]!r} has two sizes')
            return known
        self.storage_bytes += size
        found = self.length - self.storage_bytes if self.records is None else self.records.get(f'data/{name}')
        if isinstance(found, Record) and found.size != size:
            self.refuse(f'storage {name[:50]!r} has {found.size} bytes instead of {size}')
        if found is None or (isinstance(found, int) and found < 0):
            self.refuse(f'storage {name[:50]!r} is not in the file')
        self.storages[name] = Value('storage', size, unit)
        return self.storages[name]

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, unit: int | None = None) -> Value:
        if not is_kind(storage, 'storage'):
            self.refuse('it holds a tensor without a storage')
        unit = unit or storage.unit
        shape, steps, (first,) = self._integers(sizes), self._integers(strides), self._integers(Tuple([offset]))
        count = math.prod(shape)
        last = first + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        if (last + 1 if count else first) * unit > storage.size:
            self.refuse(f'a tensor of shape {tuple(shape)} reaches beyond the {storage.size} bytes of its storage')
        self.tensor_bytes += count * unit
        if self.tensor_bytes > 4 * self.length + SPARE_BYTES:
            self.refuse(
                f'its tensors have {self.tensor_bytes >> 20} MiB or more together, in a file of {self.length} bytes'
            )
        return Value('tensor', count * unit)

    def _tensor_v2(
        self, storage: Any, offset: Any, sizes: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> Value:
        self._check_hooks(hooks)
        if metadata is not None and (not _is_dict(metadata) or metadata.items):
            self.refuse('it holds a tensor that is conjugated or negated')
        return self._tensor(storage, offset, sizes, strides)

    def _tensor_v3(
        self,
        storage: Any,
        offset: Any,
        sizes: Any,
        strides: Any,
        grad: Any,
        hooks: Any,
        dtype: Any,
        metadata: Any = None,
    ) -> Value:
        self._tensor_v2(storage, 0, Tuple([0]), Tuple([0]), grad, hooks, metadata)
        found = _DTYPE.match(getattr(dtype, 'text', ''))
        if found is None:
            self.refuse('it holds a tensor of unknown dtype')
        return self._tensor(storage, offset, sizes, strides, getattr(torch, found.group(1)).itemsize)

    def _parameter(self, tensor: Any, grad: Any, hooks: Any, state: Any = None) -> Value:
        self._check_hooks(hooks)
        if not is_kind(tensor, 'tensor'):
            self.refuse('it holds a parameter without a tensor')
        if state is not None:
            if not _is_dict(state):
                self.refuse('it holds a parameter with an unusual state')
            self._check_attributes(torch.nn.Parameter, state)
        return Value('tensor', tensor.size)

    def _check_hooks(self, hooks: Any) -> None:
        if hooks is not None and (not is_kind(hooks, 'ordered') or hooks.items):
            self.refuse('it holds a tensor with hooks')


def _is_dict(value: Any) -> bool:
    return is_kind(value, 'dict') or is_kind(value, 'ordered')


def _is_own(statistics: dict[Any, Any]) -> bool:
    """Whether each statistics method has its own name; unpickling sets them on the class, for all history buffers."""
    return all(is_kind(value, 'method') and key in value.items for key, value in statistics.items())


def _trusted_by_the_user() -> set[str]:
    """Globals that the user's own code has allowed with ``torch.serialization.add_safe_globals``."""
    allowed: list = getattr(torch.serialization, 'get_safe_globals', list)()  # PyTorch >= 2.4
    names = {entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}' for entry in allowed}
    return {name for name in names if name.partition('.')[0] != 'numpy'}  # added by safe_globals.py, and checked here
