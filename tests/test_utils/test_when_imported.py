"""Calls after the import of another library."""

import importlib
import importlib.util
import sys
import threading
from pathlib import Path

import pytest

from vheat_mm.utils import when_imported as module
from vheat_mm.utils.when_imported import when_imported


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    """Writes ``laterlib.py``, which nothing has imported; afterwards it is gone, with what waits for it."""
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    monkeypatch.setattr(sys, 'meta_path', [f for f in sys.meta_path if f is not module._finder])
    monkeypatch.setattr(module, '_pending', {})

    def write(text: str) -> None:
        (tmp_path / 'laterlib.py').write_text(text)
        importlib.invalidate_caches()

    write('VALUE = 1\n')
    yield write
    sys.modules.pop('laterlib', None)


def waits() -> bool:
    return module._finder in sys.meta_path


def test_is_called_once_whether_the_library_is_imported_before_or_later(library):
    calls: list[str] = []
    when_imported('laterlib', lambda: calls.append(f'later {sys.modules["laterlib"].VALUE}'))
    when_imported('laterlib', lambda: calls.append('second'))
    assert not calls
    assert 'laterlib' not in sys.modules

    laterlib = importlib.import_module('laterlib')
    assert calls == ['later 1', 'second']
    assert not waits()
    # What the interpreter and tools read of a module is as without us.
    assert type(laterlib.__loader__) is type(laterlib.__spec__.loader) is type(module.__loader__)

    when_imported('laterlib', lambda: calls.append('at once'))
    importlib.reload(laterlib)
    del sys.modules['laterlib']
    importlib.import_module('laterlib')
    assert calls == ['later 1', 'second', 'at once']
    assert not waits()


def test_a_library_that_cannot_be_imported_fails_as_without_us(library):
    calls: list[str] = []
    when_imported('laterlib', lambda: calls.append('called'))
    when_imported('no_such_library_anywhere', lambda: calls.append('wrong'))
    with pytest.raises(ModuleNotFoundError, match='no_such_library_anywhere'):
        importlib.import_module('no_such_library_anywhere')
    library('raise OSError("broken")')
    with pytest.raises(OSError, match='broken'):
        importlib.import_module('laterlib')
    assert not calls
    library('VALUE = 22\n')  # repaired
    importlib.import_module('laterlib')
    assert calls == ['called']
    assert waits()  # for the other


def test_looking_for_the_library_calls_nothing(library):
    calls: list[str] = []
    when_imported('laterlib', lambda: calls.append('called'))
    assert importlib.util.find_spec('laterlib').origin.endswith('laterlib.py')
    assert not calls


@pytest.mark.parametrize('before', [False, True])
def test_an_error_in_the_callback_is_logged_and_the_import_works(library, monkeypatch, before):
    calls: list[str] = []
    lines: list[str] = []
    monkeypatch.setattr(module, 'print_log', lambda text, **_: lines.append(text))

    def fail() -> None:
        raise ValueError('no slot')

    if before:
        importlib.import_module('laterlib')
    when_imported('laterlib', fail)
    when_imported('laterlib', lambda: calls.append('next'))
    assert importlib.import_module('laterlib').VALUE == 1
    assert calls == ['next']
    assert lines == ['vheat_mm is not registered with laterlib, which works without it: ValueError: no slot']


def test_waits_for_another_thread_that_is_importing_the_library(library):
    library('import time, sys\nsys.started.set()\ntime.sleep(0.2)\nVALUE = 3\n')
    sys.started = threading.Event()
    thread = threading.Thread(target=importlib.import_module, args=('laterlib',))
    thread.start()
    try:
        assert sys.started.wait(10)
        values: list[int] = []
        when_imported('laterlib', lambda: values.append(sys.modules['laterlib'].VALUE))
        assert values == [3]
    finally:
        thread.join()
        del sys.started


def test_threads_that_import_at_once_call_once_and_all_wait(library):
    library('import time\ntime.sleep(0.1)\n')
    calls: list[int] = []
    seen: list[int] = []
    when_imported('laterlib', lambda: calls.append(1))

    def run() -> None:
        importlib.import_module('laterlib')
        seen.append(len(calls))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]
    assert not waits()
