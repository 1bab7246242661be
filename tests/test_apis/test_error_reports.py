"""The last line on stderr is the error, whatever was printed before."""

from __future__ import annotations

import pytest
from mmengine.runner.base_loop import BaseLoop

from vheat_mm.apis.errors import run_reporting_errors
from vheat_mm.utils.errors import ArgumentError, ToolError
from vheat_mm.utils.process import STOP_NOTE


class Loop(BaseLoop):
    """A training that ends with an error, in a hook or in an iteration."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self) -> None:
        self.before_train()
        self.run_iter()

    def run_iter(self) -> None:
        raise self.error

    def before_train(self) -> None: ...


class FailingAtStart(Loop):
    def before_train(self) -> None:
        raise self.error


def report(capfd, error: Exception, finished: bool) -> tuple[int, list[str]]:
    def body() -> None:
        print('a print of a library')
        (Loop if finished else FailingAtStart)(error).run()

    status = run_reporting_errors(body)
    return status, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ('error', 'finished', 'status', 'last'),
    [
        (ToolError('drop --seed'), False, 2, 'error: drop --seed'),
        (ToolError('drop --seed'), True, 2, 'error: drop --seed'),
        (ArgumentError('slice_size', 0, 'too small'), False, 2, 'error: --slice 0: too small'),
        (ArgumentError('half', True, 'no GPU'), False, 2, 'error: --half: no GPU'),
        (ArgumentError('classes', ['a', 'b'], 'no b'), False, 2, 'error: --classes a b: no b'),
        (
            TypeError('two\nlines'),
            False,
            2,
            'error: TypeError: two lines (VHEAT_TRACEBACK=1 shows where it comes from)',
        ),
        (TypeError('two\nlines'), True, 1, 'error: TypeError: two lines'),
        (
            RuntimeError('Caught TypeError in DataLoader worker process 0.\nTraceback ...\nTypeError: no'),
            True,
            1,
            'error: TypeError: no',
        ),
    ],
)
def test_last_line(capfd, error, finished, status, last):
    found, lines = report(capfd, error, finished)
    assert (found, lines[-1]) == (status, last)
    assert any(line.startswith('Traceback') for line in lines) == (status == 1)


def test_long_messages_are_shortened(capfd):
    """MMEngine's errors may hold the whole config."""
    lines = report(capfd, ValueError('x' * 100_000 + ' the end'), False)[1]
    assert len(lines) == 1
    assert len(lines[0]) < 1000
    assert ' the end ' in lines[0]


def test_one_process_of_a_launcher_prints(capfd, tmp_path, monkeypatch):
    """After a restart, one prints again."""
    monkeypatch.setenv(STOP_NOTE, str(tmp_path / 'stopped'))
    for round_ in '01':
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', round_)
        printed = [len(report(capfd, ToolError('no'), False)[1]) for _ in range(3)]
        assert printed == [1, 0, 0]


def test_a_lost_connection_points_at_the_other_process(capfd, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr('vheat_mm.apis.errors.time.sleep', lambda _: None)
    status, lines = report(capfd, RuntimeError('[pair.cc:1] Connection closed by peer [127.0.0.1]'), True)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith('error: another process of this run has ended')
