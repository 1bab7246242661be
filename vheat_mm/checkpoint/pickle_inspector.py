"""Whether a checkpoint's pickle does nothing but describe tensors, numbers and names, found out without running it.

PyTorch's safe loader runs no code, but it takes the file's word for sizes: a few bytes make it allocate terabytes,
read beyond a buffer, or hash for years. Here the pickle's opcodes are followed with stand-ins in place of the objects,
and everything that a checkpoint has no use for is refused.
"""

from __future__ import annotations

import abc
import pickletools
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn, cast

from vheat_mm.checkpoint.zip_layout import Record
from vheat_mm.utils.errors import CheckpointError

MAX_OPCODES = 500_000  # vHeat-base with its average and AdamW, one parameter group per weight: 78 225
MAX_DEPTH = 100
_MAX_KEY = 1 << 31  # larger integers could be chosen to have one hash

_SINGLETONS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_PUSHED = {'BININT', 'BININT1', 'BININT2', 'BINFLOAT', 'BINUNICODE', 'LONG1', 'SHORT_BINSTRING'}


@dataclass(eq=False, slots=True)
class Value:
    """Stands for an object of the checkpoint.

    Attributes:
        kind: What it is: ``'dict'``, ``'tensor'``, ...
        size: Bytes of a storage or of bytes; bytes per element of a dtype.
        unit: Bytes per element of a storage.
        items: What a dict or a list holds.
        hashable: Whether all that a list holds may be in a set.
        depth: Levels of containers in it.
        closed: Whether it is part of another object, after which pickles of PyTorch change it no more.
    """

    kind: str
    size: int = 0
    unit: int = 1
    items: dict[Any, Any] = field(default_factory=dict)
    hashable: bool = True
    depth: int = 0
    closed: bool = False


class Tuple(tuple):
    """A tuple of stand-ins, with its depth."""

    depth = 1


@dataclass(eq=False, slots=True)
class Name:
    """A global, by module and name."""

    text: str


class Machine(abc.ABC):
    """Follows the pickles of one file; a subclass says which objects may be made.

    Args:
        name: The file, named in errors.
        records: Records of a zip file; ``None`` for PyTorch's older format, one stream.
        length: Bytes of the file.
    """

    def __init__(self, name: str, records: dict[str, Record] | None, length: int) -> None:
        self.name = name
        self.records = records
        self.length = length
        self.left = MAX_OPCODES

    def read(self, stream: IO[bytes]) -> Any:
        """Follow one pickle from the stream's position to its end.

        Returns:
            The stand-in of what it makes.

        Raises:
            CheckpointError: Damaged, or anything but a checkpoint's.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.left -= 1
                if self.left < 0:
                    self.refuse(f'it takes more than {MAX_OPCODES} pickle opcodes')
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
                f'{self.name!r} is damaged or no PyTorch file: its pickle is malformed ({type(error).__name__}); '
                'compare its size with the source and copy it again'
            ) from error

    def read_names(self, stream: IO[bytes]) -> list[str]:
        """Follow a pickle that holds a list of names."""
        found = self.read(stream)
        if not is_kind(found, 'list') or not all(isinstance(name, str) for name in found.items.values()):
            self.refuse('it holds no list of its storages')
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
            arguments, made = stack.pop(), stack.pop()
            stack.append(self.make(made, arguments, opcode))
        elif opcode == 'BUILD':
            state = self._close(stack.pop())
            self.build(stack[-1], state)
        elif opcode == 'BINPERSID':
            stack.append(self.storage(stack.pop()))
        else:
            self.refuse(f'it uses the pickle opcode {opcode}, which PyTorch does not write')

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error that says so."""
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
            self.refuse('it changes an object that is finished, or is no container')
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
                self.refuse('it holds a dict whose keys are neither names nor small integers')
            target.items[key] = value
        self._deepen(target, values[1::2])

    def _deepen(self, target: Value, values: list[Any]) -> None:
        target.depth = max(target.depth, self._depth_above(values))
        if target.closed:
            self.refuse('it holds a container that is in itself')

    # --- objects

    @abc.abstractmethod
    def find(self, argument: str) -> Any:
        """What a global stands for, given as module and name with a space between."""

    @abc.abstractmethod
    def make(self, made: Any, arguments: Any, opcode: str) -> Any:
        """What calling a global makes."""

    @abc.abstractmethod
    def build(self, target: Any, state: Any) -> None:
        """Give an object its state."""

    @abc.abstractmethod
    def storage(self, key: Any) -> Any:
        """The storage that a key outside the pickle names."""


def is_kind(value: Any, kind: str) -> bool:
    """Whether something stands for an object of a kind."""
    return isinstance(value, Value) and value.kind == kind


def is_key(value: Any) -> bool:
    """Whether something may be a dict's key, or in a set."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < _MAX_KEY)
