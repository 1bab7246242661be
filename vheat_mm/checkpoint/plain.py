"""Checkpoints that ``read_checkpoint`` will read: what it would refuse is found before it is saved."""

from __future__ import annotations

import enum
import io
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from vheat_mm.checkpoint.pickle_rules import SPARE_BYTES
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.checkpoint.verify import check_content
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_KEPT = (dict, OrderedDict, Counter, list, tuple, set, torch.Size)
_MOST_EXPANDED = SPARE_BYTES // 8  # bytes of a tensor that repeats its storage; few of them together can be read
_BASES: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def to_plain(value: Any) -> Any:
    """Convert subclasses and wrappers to the plain types that the loader allows, where that loses nothing.

    ``ConfigDict`` becomes a dict, a named tuple a tuple, a path or an enum its value, a numpy array of strings or
    objects a list, a tensor with own attributes, conjugated or far expanded, one that is not. Other values are returned
    as they are, also those that the loader refuses: see :func:`find_refused`. A container is copied only if something
    in it is converted.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.ndarray):
        readable = value.dtype.kind in 'biuf' and value.dtype.isnative and value.dtype.itemsize <= 8
        if not readable:
            return to_plain(value.tolist())
        return value if type(value) is np.ndarray else value.view(np.ndarray)
    if isinstance(value, np.generic):
        return value if value.dtype.kind in 'biuf' and value.dtype.itemsize <= 8 else value.item()
    if isinstance(value, Tensor):
        return _plain_tensor(value) if type(value) is Tensor and value.layout is torch.strided else value
    for base in _BASES:
        if isinstance(value, base):
            return value if type(value) is base else base(value)
    if isinstance(value, range):
        return list(value)
    return _container(value)


def _plain_tensor(value: Tensor) -> Tensor:
    if vars(value) or value.grad_fn:
        value = value.detach()
    if value.nbytes > max(_MOST_EXPANDED, 4 * value.untyped_storage().nbytes()):
        value = value.contiguous()
    return value.resolve_conj().resolve_neg()


def _container(value: Any) -> Any:
    kind: Any
    if isinstance(value, dict):
        keys = [_key(key) for key in value]
        items = [to_plain(item) for item in dict.values(value)]
        changed = any(new is not old for new, old in zip([*keys, *items], [*value, *dict.values(value)], strict=True))
        kind = next(kind for kind in (OrderedDict, Counter, dict) if isinstance(value, kind))
        if type(value) is kind and not changed:
            return value
        made = kind(dict(zip(keys, items, strict=True)))
        if kind is OrderedDict:
            vars(made).update(to_plain(vars(value)))  # the versions of modules in a ``state_dict``
        return made
    if isinstance(value, list | tuple | set | frozenset):
        kind = next((kind for kind in (torch.Size, list, tuple) if isinstance(value, kind)), set)
        items = [to_plain(item) for item in value]
        same = type(value) is kind and all(new is old for new, old in zip(items, value, strict=True))
        return value if same else kind(items)
    return value


def _key(key: Any) -> Any:
    return key.item() if isinstance(key, np.generic) else to_plain(key)


def drop_functions(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter scheduler without functions and classes, which a new instance has already."""
    return {key: value for key, value in state.items() if not isinstance(value, (*FUNCTIONS, type))}


def find_refused(value: Any, place: str = '') -> tuple[str, str] | None:
    """The first part of a checkpoint that the loader would refuse.

    The value is written, with one tensor of each type and one history of scalars, and read by the loader's own checks.

    Returns:
        Its place (``meta.dataset_meta.palette[3]``) and why; ``None`` if all of it can be read.
    """
    reason = _refusal(value)
    if reason is None:
        return None
    parts = list(_parts(value, place))
    while len(parts) > 1:  # by halves: there may be many
        half = parts[: len(parts) // 2]
        parts = half if _refusal([part for _, part in half]) else parts[len(parts) // 2 :]
    if parts and (found := find_refused(parts[0][1], parts[0][0])) is not None:
        return found
    kind = 'a function' if isinstance(value, FUNCTIONS) else f'{type(value).__module__}.{type(value).__qualname__}'
    return place, reason if isinstance(value, dict | list | tuple | set | str) else kind.removeprefix('builtins.')


def _parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f'{place}.{key}'.lstrip('.'), item
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield f'{place}[{index}]', item


def _refusal(value: Any) -> str | None:
    """Why the loader would refuse a checkpoint with this value, or ``None``."""
    register_safe_globals()
    file = io.BytesIO()
    try:
        torch.save({'value': _without_contents(value, {})}, file)
        check_content(file, '', checksums=False)
        torch.load(file, map_location='cpu', weights_only=True)
    except CheckpointError as error:
        text = str(error)
        return text.removeprefix("'' was refused: it ").split('. Loading')[0].split(', which is neither')[0]
    except Exception as error:  # pickle and PyTorch raise many types, and so does code of the value's class
        return f'{type(error).__name__}: {first_line(error)}'
    return None


def _without_contents(value: Any, shared: dict[Any, Any], levels: int = 200) -> Any:
    """The same structure with one tensor or history of scalars in place of all that are written alike, to save time."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        return shared.setdefault(value.dtype, torch.empty(0, dtype=value.dtype)) if plain and not vars(value) else value
    if type(value) is HistoryBuffer:
        return shared.setdefault(HistoryBuffer, value)
    if not levels or type(value) not in _KEPT:
        return value
    if isinstance(value, dict):
        made = type(value)({key: _without_contents(item, shared, levels - 1) for key, item in value.items()})
        if isinstance(made, OrderedDict):
            vars(made).update(vars(value))  # the versions of modules
        return made
    return type(value)(_without_contents(item, shared, levels - 1) for item in value)
