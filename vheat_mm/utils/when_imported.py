"""Calls after the import of another library: to register with one that may be missing, or be imported later."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from mmengine.logging import print_log

from vheat_mm.utils.text import summarize_error

_pending: dict[str, list[Callable[[], object]]] = {}
_lock = threading.Lock()


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback`` once: now if a module is imported already, else right after its import.

    An error in the callback is logged as a warning: it must not break an import that worked without this package.

    Args:
        name: Full name of the module; nothing happens if it is never imported, or cannot be.
        callback: Called in the thread that imports the module, before its import statement returns.
    """
    with _lock:
        _pending.setdefault(name, []).append(callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    if sys.modules.get(name) is None:
        return
    try:
        importlib.import_module(name)  # waits for another thread that is importing it
    except Exception:  # that thread is told; the next import calls back
        return
    _call_back(name)


def _call_back(name: str) -> None:
    with _lock:
        callbacks = _pending.pop(name, [])
        if not _pending:  # a new list, as other threads may be iterating over the old one
            sys.meta_path = [finder for finder in sys.meta_path if finder is not _finder]
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            text = f'vheat_mm is not registered with {name}, which works without it: {summarize_error(error)}'
            print_log(text, logger='current', level=logging.WARNING)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, with a loader that calls back."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _pending:
            return None
        found = (f.find_spec(fullname, path, target) for f in list(sys.meta_path) if f is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:  # a folder without __init__.py has none
            spec.loader = _CallingLoader(spec.loader)
        return spec


class _CallingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _call_back(module.__spec__.name)


_finder = _Finder()
