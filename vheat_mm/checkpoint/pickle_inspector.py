"""Following the opcodes of a checkpoint's pickle without creating its objects.

PyTorch's safe loader runs no code from a file, but it trusts the sizes in it: a few bytes make it allocate terabytes,
read beyond a buffer, or compute hashes for years. Here placeholders stand for the objects, and everything that a
checkpoint does not need is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn, cast

from vheat_mm.checkpoint.zip_layout import Record
from vheat_mm.utils.errors import CheckpointError

# vHeat-base with moving average and AdamW, one parameter group per weight, has 78 225; 90 000 class names with colours
# have a million in 4 MB. A file of less than 1 MB has at most the first number, which takes about a second.
MAX_OPCODES, MOST_OPCODES = 500_000, 4_000_000
MAX_DEPTH = 100
_MAX_KEY = 1 << 31  # larger integers can be chosen to have equal hashes, which makes a dict slow

_SINGLETONS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_PUSHED = {'BININT', 'BININT1', 'BININT2', 'BINFLOAT', 'BINUNICODE', 'LONG1', 'SHORT_BINSTRING'}


@dataclass(eq=False, slots=True)
class Value:
    """Placeholder for an object of the checkpoint.

    Attributes:
        kind: Its type: ``'dict'``, ``'tensor'``, ...
        size: Length in bytes of a storage or a bytes object; bytes per element of a dtype.
        unit: Bytes per element of a storage.
        items: Items of a dict or a list.
        hashable: Whether all items of a list may be in a set.
        depth: Levels of containers in it.
        closed: Whether it is part of another object; pickles of PyTorch do not change it after that.
    """

    kind: str
    size: int = 0
    unit: int = 1
    items: dict[Any, Any] = field(default_factory=dict)
    hashable: bool = True
    depth: int = 0
    closed: bool = False


class Tuple(tuple):
    """A tuple of placeholders, with its depth."""

    depth = 1


@dataclass(eq=False, slots=True)
class Name:
    """A global: ``module.name``."""

    text: str


class PickleInspector:
    """Follows the pickles of one file; a subclass decides which objects are allowed.

    Args:
        name: The file, named in errors.
        records: Records of a zip file; ``None`` for PyTorch's format before 1.6, a single stream.
        length: Length of the file in bytes.
    """

    find: Callable[[str], Any]  # a global, given as module and name with a space between
    call: Callable[[Any, Any, str], Any]  # what a global creates from arguments, with this opcode
    build: Callable[[Any, Any], None]  # sets the state of an object
    storage: Callable[[Any], Any]  # the storage with this persistent id

    def __init__(self, name: str, records: dict[str, Record] | None, length: int) -> None:
        self.name = name
        self.records = records
        self.length = length
        self.limit = self.left = max(MAX_OPCODES, min(length // 2, MOST_OPCODES))

    def read(self, stream: IO[bytes]) -> Any:
        """Follow one pickle from the stream's position to its end.

        Returns:
            The placeholder of the object it creates.

        Raises:
            CheckpointError: The pickle is corrupt, or creates an object that is not allowed.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.left -= 1
                if self.left < 0:
                    self.refuse(f'it takes more than {self.limit} pickle opcodes')
                if opcode.name in _PUSHED:
                    if opcode.name == 'SHORT_BINSTRING' and not cast(str, argument).isascii():
                        self.refuse('it holds a byte string of Python 2')
                    self.stack.append(argument)
                elif opcode.name in _SINGLETONS:
                    self.stack.append(_SINGLETONS[opcode.name])
                elif opcode.name in ('BINPUT', 'LONG_BINPUT'):
                    memo[cast(int, argument)] = self.stack[-1]
                elif opcode.name in ('BINGET', 'LONG_BINGET'):
                    self.stack.append(memo[cast(int, argument)])
                elif opcode.name == 'GLOBAL':
                    self.stack.append(self.find(cast(str, argument)))
                elif opcode.name == 'STOP':
                    return self.stack.pop()
                elif opcode.name != 'PROTO':
                    self._step(opcode.name)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f'{self.name!r} is corrupt or not a PyTorch file: its pickle is malformed ({type(error).__name__}); '
                'compare its size with the source and copy it again'
            ) from error

    def read_names(self, stream: IO[bytes]) -> list[str]:
        """Follow a pickle that creates a list of strings, and return it."""
        found = self.read(stream)
        if not is_kind(found, 'list') or not all(isinstance(name, str) for name in found.items.values()):
            self.refuse('it has no list of its storages')
        return list(found.items.values())

    def _step(self, opcode: str) -> None:
        stack = self.stack
        if opcode == 'MARK':
            self.below.append(stack)
            self.stack = []
        elif opcode in ('EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE'):
            stack.append(Tuple() if opcode == 'EMPTY_TUPLE' else Value(opcode[6:].lower()))
        elif opcode in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            count = int(opcode[-1])
            if len(stack) < count:
                raise IndexError(opcode)
            stack[-count:] = [self._tuple(stack[-count:])]
        elif opcode == 'TUPLE':
            items = self._pop_mark()
            self.stack.append(self._tuple(items))
        elif opcode in ('APPEND', 'APPENDS'):
            self._append([stack.pop()] if opcode == 'APPEND' else self._pop_mark())
        elif opcode in ('SETITEM', 'SETITEMS'):
            items = [stack.pop(-2), stack.pop()] if opcode == 'SETITEM' else self._pop_mark()
            self._set_items(items)
        elif opcode in ('REDUCE', 'NEWOBJ'):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments, opcode))
        elif opcode == 'BUILD':
            state = self._close(stack.pop())
            self.build(stack[-1], state)
        elif opcode == 'BINPERSID':
            stack.append(self.storage(stack.pop()))
        else:
            self.refuse(f'it uses the pickle opcode {opcode}, which PyTorch does not write')

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error with this reason."""
        raise CheckpointError(
            f'{self.name!r} was refused: {reason}. Loading it could exhaust or damage the process; '
            'ask its author for a file of tensors only.'
        )

    # --- containers

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def _close(self, value: Any) -> Any:
        if isinstance(value, Value):
            value.closed = True
        return value

    def _depth_above(self, values: list[Any]) -> int:
        depth = 1 + max((getattr(self._close(value), 'depth', 0) for value in values), default=0)
        if depth > MAX_DEPTH:
            self.refuse(f'it nests objects more than {MAX_DEPTH} levels deep')
        return depth

    def _tuple(self, values: list[Any]) -> Tuple:
        made = Tuple(values)
        made.depth = self._depth_above(values)
        return made

    def _open(self, kinds: tuple[str, ...]) -> Value:
        target = self.stack[-1]
        if not isinstance(target, Value) or target.kind not in kinds or target.closed:
            self.refuse('it changes an object that is complete or not a container')
        return target

    def _append(self, values: list[Any]) -> None:
        target = self._open(('list',))
        target.hashable = target.hashable and all(is_key(value) for value in values)
        target.items.update(enumerate(values, len(target.items)))
        self._deepen(target, values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._open(('dict', 'ordered', 'counter'))
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not is_key(key):
                self.refuse('it holds a dict whose keys are neither strings nor small integers')
            target.items[key] = value
        self._deepen(target, values[1::2])

    def _deepen(self, target: Value, values: list[Any]) -> None:
        target.depth = max(target.depth, self._depth_above(values))
        if target.closed:
            self.refuse('it holds a container that contains itself')


def is_kind(value: Any, kind: str) -> bool:
    """Whether this is the placeholder of an object of a kind."""
    return isinstance(value, Value) and value.kind == kind


def is_key(value: Any) -> bool:
    """Whether this may be a key of a dict or an item of a set."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < _MAX_KEY)
