"""Where in a config or a model an error comes from, and entries with a similar name."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry
from torch import nn

from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import describe

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def type_name(part: Any) -> str:
    """The class name of a part of a config, whose ``type`` is a name (with or without scope or module) or a class.

    Args:
        part: A dict with ``type``, or an object that was built already. Configs in pure Python hold classes.
    """
    kind = part.get('type') if isinstance(part, dict) else type(part)
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', '')).split('.')[-1]


def is_type(part: Any, name: str) -> bool:
    """Whether a part of a config has that type; see :func:`type_name`."""
    return type_name(part) == name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'lr'?"`` if a known name is similar, else an empty string."""
    close = difflib.get_close_matches(name, list(known), 1, 0.75)
    return f', did you mean {close[0]!r}?' if close else ''


def locate(cfg: Any, part: dict | list, exact: bool = False) -> str:
    """Place of a part of a config as ``--cfg-options`` name it: ``'train_dataloader.dataset.pipeline.3'``.

    The libraries copy their parts of a config and add entries. So where nothing is the same or equal, the place is that
    of the largest dict that ``part`` contains.

    Args:
        cfg: The config.
        part: A dict, or a list of dicts.
        exact: Whether it must be the same or equal.

    Returns:
        An empty string if there is none.
    """
    best, place = 0.0, ''
    for name, node in _nodes(cfg, ''):
        if node is part:
            return name
        if isinstance(node, dict) and isinstance(part, dict):
            same = sum(key in part and _equal(part[key], value) for key, value in node.items())
            equal = same == len(node) == len(part)
            contained = same == len(node) or (same > 1 and node.get('type') is not None and 'type' in part)
            # Equal dicts win, then those with the most entries; of several places, the first.
            share = (2 if equal else 0) + same / max(len(node), len(part), 1)
            fits = same and type_name(node) == type_name(part) and (equal if exact else contained)
        else:
            share, fits = 2, bool(part) and _equal(node, part)
        if fits and share > best:
            best, place = share, name
    return place


def _nodes(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All dicts and lists of dicts in a config with their places."""
    if isinstance(node, (dict, Config)):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, (list, tuple)) and all(isinstance(value, dict) for value in node):
        items = enumerate(node)
    else:
        return
    if name:
        yield name, node
    for key, value in items:
        yield from _nodes(value, f'{name}.{key}' if name else str(key))


def _equal(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours is theirs or ours == theirs)
    except Exception:  # objects whose comparison fails, such as arrays
        return False


def describe_building(error: BaseException) -> str:
    """Message of an error in MMEngine's building of an object from a config, with similar names."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if (part := _part_of(frame)) is not None:
            return _message(error, frame, part) or describe(error)
    return describe(error)


def explain(error: BaseException) -> tuple[str, str]:
    """Place in the config, or in the model, and message of an error in MMEngine's work with a config or in a model.

    Returns:
        Empty strings if the error comes from elsewhere. The message is empty if there is nothing to add to the error's
        own one.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    root = next((value for frame in frames for value in frame.f_locals.values() if isinstance(value, Config)), None)
    for frame in reversed(frames) if root is not None else ():
        part = _part_of(frame)
        if part is not None and (place := locate(root, part)):
            return place, _message(error, frame, part)
        code = frame.f_code
        names = [name for name in code.co_varnames[: code.co_argcount] if name not in ('self', 'cls')]
        values = [frame.f_locals.get(name) for name in names]
        places = [locate(root, value, exact=True) if isinstance(value, (dict, list)) else '' for value in values]
        if places and places[0] and not any(places[1:]):  # the function works with this part alone
            return places[0], ''
    owners = (frame.f_locals.get('self') for frame in frames)
    # A model whose building failed may have no _modules yet.
    modules = [owner for owner in owners if isinstance(owner, nn.Module) and '_modules' in vars(owner)]
    for name, module in unwrap(modules[0]).named_modules() if modules else ():
        if name and module is modules[-1]:
            return f'model.{name}', f'{describe(error)}, in {type(module).__name__}({module.extra_repr()})'
    return '', ''


def _part_of(frame: FrameType) -> dict | None:
    """The part of a config with which a frame of MMEngine works."""
    names = frame.f_locals
    if frame.f_code.co_name == 'build_from_cfg' and isinstance(names.get('cfg'), dict):
        return names['cfg']
    if isinstance(names.get('optimizer_cfg'), dict):  # constructors of optimizer wrappers
        return names['optimizer_cfg']
    return names['self'] if isinstance(names.get('self'), ConfigDict) else None


def _message(error: BaseException, frame: FrameType, part: dict) -> str:
    if part is frame.f_locals.get('self'):
        name = frame.f_locals.get('name', error.args[0] if error.args else '')
        return f'there is no {name!r}{did_you_mean(str(name), part)}' if isinstance(name, str) else ''
    if isinstance(error, KeyError) and 'type' not in part and 'must contain the key "type"' in str(error):
        return f'there is no type in {dict(part)}; a base config may be missing, or overwritten with _delete_=True'
    kind, registry, built = part.get('type'), frame.f_locals.get('registry'), frame.f_locals.get('obj_cls')
    if isinstance(registry, Registry) and isinstance(kind, str) and built is None and registry.get(kind) is None:
        hint = did_you_mean(kind, _names(registry)) or '; custom_imports must name the module that registers it'
        return f'type={kind!r} is not in the registry of {registry.name}s{hint}'
    if isinstance(error, TypeError) and callable(built) and (found := _UNEXPECTED.search(str(error))):
        owners = built.__mro__ if inspect.isclass(built) else (built,)
        known = {name for owner in owners for name in _parameters(owner)}
        if found.group(1) in part and found.group(1) not in known:
            return f'{type_name(part)} takes no {found.group(1)!r}{did_you_mean(found.group(1), known)}'
    return ''


def _names(registry: Registry) -> set[str]:
    """Names in a registry, those it inherits and those of the libraries below."""
    names: set[str] = set()
    while registry is not None:
        names |= set(registry.module_dict)
        for child in registry.children.values():
            names |= set(child.module_dict)
        registry = registry.parent
    return names


def _parameters(owner: Any) -> Iterable[str]:
    try:
        return inspect.signature(owner).parameters
    except (TypeError, ValueError):  # classes of C
        return ()
