"""Transforms, samplers and hooks whose attributes change while they are used: no checkpoint holds these."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

_LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch', 'torchvision', 'vheat_mm'}
_CHANGING = {
    'append', 'appendleft', 'extend', 'insert', 'pop', 'popleft', 'remove', 'clear', 'add', 'update', 'setdefault',
}  # fmt: skip
_SET_UP = {'__init__', '__new__', '__setstate__', 'set_epoch', 'before_run', 'before_train'}
_LOADING = {'__getitem__', '__getitems__', 'prepare_data', 'get_data_info'}


def note_stateful_parts(runner: Runner) -> str | None:
    """One line for the log that names the parts of a training whose state a resumed run does not have."""
    loader = runner.train_loop.dataloader
    samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, 'sampler', None)]
    hooks = [hook for hook in runner.hooks if not _keeps_its_state(hook) and _changes_others(type(hook))]
    named = {
        type(part).__name__: attributes
        for part in (*_transforms(loader.dataset), *samplers, *hooks)
        if (attributes := changing_attributes(type(part)))
    }
    if not named:
        return None
    text = ', '.join(f'{name} ({", ".join(attributes)})' for name, attributes in named.items())
    return (
        f'state in attributes, which no checkpoint holds: {text}. After resuming it starts anew, and the run may '
        'differ from an uninterrupted one; each data-loader worker has its own'
    )


def _keeps_its_state(hook: Hook) -> bool:
    """Hooks of the libraries derive their state from epoch and iteration, or store it."""
    of_library = type(hook).__module__.partition('.')[0] in _LIBRARIES
    return of_library or type(hook).before_save_checkpoint is not Hook.before_save_checkpoint


def _changes_others(kind: type) -> bool:
    """Whether a method sets a value outside of its object and of dicts that it makes; a hook may only keep records."""
    for owner in kind.__mro__[: kind.__mro__.index(Hook)]:
        for method in _methods(owner.__module__, owner.__name__):
            nodes = list(ast.walk(method))
            made = [node.targets[0] for node in nodes if isinstance(node, ast.Assign) and _is_new(node.value)]
            stored = [node for node in nodes if isinstance(getattr(node, 'ctx', None), ast.Store)]
            targets = [node for node in stored if isinstance(node, ast.Attribute | ast.Subscript)]
            roots = {re.split(r'[.[]', ast.unparse(target))[0] for target in targets}
            if roots - {'self', *map(ast.unparse, made)}:
                return True
    return False


def _is_new(value: ast.expr) -> bool:
    return ast.unparse(value).startswith(('{', '[', 'dict(', 'list('))


def _transforms(dataset: Any, depth: int = 10) -> Iterator[Any]:
    """The data set, those inside it, and the transforms of all."""
    if dataset is None or not depth:
        return
    yield dataset
    for name in ('dataset', 'datasets', 'pipeline', 'transforms', 'transform'):
        inner = getattr(dataset, name, None)
        for part in inner if isinstance(inner, list | tuple) else [inner]:
            if hasattr(part, '__dict__') and not inspect.isroutine(part):
                yield from _transforms(part, depth - 1)


def changing_attributes(kind: type) -> list[str]:
    """Attributes that the methods of a class change after set-up, from its source; of a library, only collected ones.

    Collected: counted up, or filled by ``append`` and the like. The libraries also keep intermediate results in
    attributes, which the next sample replaces.
    """
    found: dict[str, None] = {}
    for owner in kind.__mro__:
        package = owner.__module__.partition('.')[0]
        if owner is object or package in ('torch', 'builtins', 'abc', 'typing') or owner is EarlyStoppingHook:
            continue
        for method in _methods(owner.__module__, owner.__name__):
            if method.name in _LOADING if issubclass(kind, Dataset) else method.name not in _SET_UP:
                for node in ast.walk(method):
                    found.update(dict.fromkeys(_changed(node, collected_only=package in _LIBRARIES)))
    return list(found)


def _methods(module: str, kind: str) -> list[ast.FunctionDef]:
    classes = [node for node in ast.walk(_source(module)) if isinstance(node, ast.ClassDef) and node.name == kind]
    return [method for each in classes for method in each.body if isinstance(method, ast.FunctionDef)]


@functools.cache
def _source(module: str) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):  # no source
        return ast.parse('')


def _changed(node: ast.AST, collected_only: bool) -> Iterator[str]:
    targets: list[ast.AST] = []
    if isinstance(node, ast.AugAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
        targets = [node.func.value]
    elif isinstance(node, ast.Assign):
        targets = [target for target in node.targets if isinstance(target, ast.Subscript) or not collected_only]
    for target in targets:
        inner: Any = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == 'self':
            yield inner.attr
