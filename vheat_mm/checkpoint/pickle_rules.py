"""What a checkpoint's pickle may make: containers, numbers, texts, and tensors that stay within their storages."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from vheat_mm.checkpoint.pickle_inspector import Machine, Name, Tuple, Value, is_kind
from vheat_mm.checkpoint.zip_layout import Record
from vheat_mm.utils.errors import CheckpointError

SPARE_BYTES = 1 << 29  # for tensors that repeat their storage, such as ``zeros(1).expand(...)``

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


class CheckpointPickle(Machine):
    """The pickles of a checkpoint; see :class:`~vheat_mm.checkpoint.pickle_inspector.Machine`."""

    def __init__(self, name: str, records: dict[str, Record] | None, length: int) -> None:
        super().__init__(name, records, length)
        self.storages: dict[str, Value] = {}
        self.copied = 0  # bytes that the pickle makes anew
        self.stored = 0  # bytes of all storages
        self.shown = 0  # bytes of all tensors
        self.makers: dict[str, Callable[..., Any]] = {
            'collections.OrderedDict': self._ordered_dict,
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
            'builtins.set': self._set,
            'builtins.complex': self._complex,
            'builtins.getattr': self._method,
            'numpy.dtype': self._dtype,
        }
        for core in ('numpy.core', 'numpy._core'):
            self.makers[f'{core}.multiarray._reconstruct'] = self._array
            self.makers[f'{core}.multiarray.scalar'] = self._scalar
        self.classes = {_HISTORY: 'history', 'yacs.config.CfgNode': 'ordered'}
        self.known = {*self.makers, *self.classes, *STORAGE_SIZES, 'numpy.ndarray'}
        self.trusted = _trusted_by_the_user() - self.known

    def find(self, argument: str) -> Name:
        module, _, name = argument.partition(' ')
        text = f'{"builtins" if module == "__builtin__" else module}.{name}'
        if text in self.known or text in self.trusted or _DTYPE.match(text):
            return Name(text)
        raise CheckpointError(
            f'{self.name!r} was refused: it holds {text[:200]!r}, which is neither a plain tensor nor on the list of '
            'harmless classes, and loading it could run code. Ask its author for a file of tensors only.'
        )

    def make(self, made: Any, arguments: Any, opcode: str) -> Any:
        if not isinstance(made, Name) or not isinstance(arguments, Tuple):
            self.refuse('it calls something that is no class')
        if made.text in self.classes and opcode == 'NEWOBJ' and not arguments:
            return Value(self.classes[made.text])
        if made.text in self.makers and opcode == 'REDUCE':
            return self.makers[made.text](*arguments)
        if made.text in self.trusted:
            return Value('trusted')
        return self.refuse(f'it makes a {made.text!r} from {len(arguments)} values, which no checkpoint needs')

    def build(self, target: Any, state: Any) -> None:
        if not isinstance(target, Value) or target.closed:
            self.refuse('it changes an object that is finished, or is none')
        if target.kind == 'ordered' and _is_dict(state):
            self._check_attributes(OrderedDict, state)
            metadata = state.items.get('_metadata', Value('dict'))
            if not _is_dict(metadata) or not all(_is_dict(entry) for entry in metadata.items.values()):
                self.refuse('the _metadata of its weights is no dict of dicts')
        elif target.kind == 'history' and _is_dict(state) and state.items.keys() <= _HISTORY_STATE:
            methods = [state.items[key] for key in state.items if key.endswith('statistics_methods')]
            if not all(_is_dict(method) and _names_its_own(method.items) for method in methods):
                self.refuse('it holds a HistoryBuffer whose statistics are not its own')
        elif target.kind == 'dtype':
            order = state[1] if isinstance(state, Tuple) and len(state) == 8 else None
            if order not in ('<', '|', '=') or state[0] != 3 or tuple(state[2:]) != (None, None, None, -1, -1, 0):
                self.refuse('it holds a numpy type that is not a plain little-endian number')
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
            self.refuse(f'it replaces {str(hidden[0])[:50]!r} of {owner.__name__}')

    def _copy(self, size: int) -> None:
        self.copied += size
        if self.copied > 4 * self.length:  # once into bytes, once into an array
            self.refuse('it copies the same bytes over and over')

    def _ordered_dict(self) -> Value:
        return Value('ordered')

    def _counter(self, counts: Any = None) -> Value:
        if counts is not None and not _is_dict(counts):
            self.refuse('it holds a Counter of something else than a dict')
        return Value('counter')

    def _shape(self, sizes: Any) -> Tuple:
        self._integers(sizes)
        return sizes

    def _device(self, kind: Any, index: Any = None) -> Value:
        if not isinstance(kind, str) or not re.match(r'[a-z]{1,20}$', kind) or not isinstance(index, int | None):
            self.refuse('it holds a device that is none')
        return Value('device')

    def _bytes(self, text: Any = '', encoding: Any = 'latin1') -> Value:
        if isinstance(text, str) and encoding in ('latin1', 'latin-1'):
            size = len(text)
        elif is_kind(text, 'bytes'):
            size = text.size
        else:
            self.refuse('it makes bytes of something else than a text')
        self._copy(size)
        return Value('bytes', size)

    def _set(self, values: Any = None) -> Value:
        if values is not None and not (is_kind(values, 'list') and values.hashable):
            self.refuse('it holds a set of something else than names and numbers')
        return Value('set')

    def _complex(self, real: Any, imaginary: Any) -> Value:
        if not isinstance(real, float) or not isinstance(imaginary, float):
            self.refuse('it holds a complex number made of something else than numbers')
        return Value('complex')

    def _method(self, owner: Any, name: Any) -> Value:
        if getattr(owner, 'text', None) != _HISTORY or name not in ('min', 'max', 'mean', 'current'):
            self.refuse('it takes attributes of an object')
        return Value('method', items={name: owner})

    # --- numpy

    def _dtype(self, kind: Any, align: Any = False, copy: Any = False) -> Value:
        if not isinstance(kind, str) or kind not in _NUMBERS or (align, copy) != (False, True):
            self.refuse('it holds numpy values that are no plain numbers')
        return Value('dtype', _NUMBERS[kind])

    def _array(self, owner: Any, shape: Any, kind: Any) -> Value:
        plain = is_kind(kind, 'bytes') or isinstance(kind, str)
        if getattr(owner, 'text', None) != 'numpy.ndarray' or shape != (0,) or not plain:
            self.refuse('it makes a numpy array in an unusual way')
        return Value('array')

    def _scalar(self, dtype: Any, content: Any) -> Value:
        if not is_kind(dtype, 'dtype') or not is_kind(content, 'bytes') or dtype.size != content.size:
            self.refuse('it holds a numpy number with more or fewer bytes than it needs')
        return Value('number')

    # --- tensors

    def _integers(self, values: Any) -> list[int]:
        if not isinstance(values, Tuple) or len(values) > 64:
            self.refuse('it holds a tensor whose shape is none')
        if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
            self.refuse('it holds a tensor whose shape, strides or offset are no numbers of elements')
        return list(values)

    def storage(self, key: Any) -> Value:
        if not isinstance(key, Tuple) or len(key) != (6 if self.records is None else 5) or key[0] != 'storage':
            self.refuse('it asks for something else than a storage from outside the pickle')
        _, kind, name, _, count = key[:5]
        unit = STORAGE_SIZES.get(getattr(kind, 'text', ''))
        self._integers(Tuple([count]))
        if unit is None or not isinstance(name, str) or (self.records is None and key[5] is not None):
            self.refuse('it holds a storage of no known type')
        size = count * unit
        if name in self.storages:
            known = self.storages[name]
            if (known.size, known.unit) != (size, unit):
                self.refuse(f'it gives two sizes to storage {name[:50]!r}')
            return known
        self.stored += size
        found = self.length - self.stored if self.records is None else self.records.get(f'data/{name}')
        if isinstance(found, Record) and found.size != size:
            self.refuse(f'storage {name[:50]!r} has {found.size} bytes and {size} are said to be in it')
        if found is None or (isinstance(found, int) and found < 0):
            self.refuse(f'storage {name[:50]!r} is not in the file')
        self.storages[name] = Value('storage', size, unit)
        return self.storages[name]

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, unit: int | None = None) -> Value:
        if not is_kind(storage, 'storage'):
            self.refuse('it holds a tensor without storage')
        unit = unit or storage.unit
        shape, steps, (first,) = self._integers(sizes), self._integers(strides), self._integers(Tuple([offset]))
        count = math.prod(shape)
        last = first + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        if (last + 1 if count else first) * unit > storage.size:
            self.refuse(f'a tensor of shape {tuple(shape)} reaches beyond the {storage.size} bytes of its storage')
        self.shown += count * unit
        if self.shown > 4 * self.length + SPARE_BYTES:
            self.refuse(
                f'its tensors come to more than {self.shown >> 20} MiB, repeated over a file of {self.length} bytes'
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
            self.refuse('it holds a tensor of no known type')
        return self._tensor(storage, offset, sizes, strides, getattr(torch, found.group(1)).itemsize)

    def _parameter(self, tensor: Any, grad: Any, hooks: Any, state: Any = None) -> Value:
        self._check_hooks(hooks)
        if not is_kind(tensor, 'tensor'):
            self.refuse('it holds a parameter without tensor')
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


def _names_its_own(statistics: dict[Any, Any]) -> bool:
    """Whether the statistics, which become those of all history buffers, are called what they are."""
    return all(is_kind(value, 'method') and key in value.items for key, value in statistics.items())


def _trusted_by_the_user() -> set[str]:
    """Names that the user's own code has allowed PyTorch's safe loader."""
    allowed: list = getattr(torch.serialization, 'get_safe_globals', list)()  # PyTorch >= 2.4
    names = {entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}' for entry in allowed}
    return {name for name in names if name.partition('.')[0] != 'numpy'}  # those of compat.py, checked here
