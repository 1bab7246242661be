"""Signals before the first iteration, and processes whose launcher is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tool_runs import REPO, TOOLS, clean_environment

from vheat_mm.engine.hooks import StopSignalHook
from vheat_mm.utils import process

PREPARE = f"""
import ctypes, os, runpy, signal, sys, time
process = runpy.run_path({str(REPO / 'vheat_mm' / 'utils' / 'process.py')!r})
"""


def start(*command: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """Start a process and return once it has printed a line."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    names = [str(part) for part in command]
    started = subprocess.Popen(names, cwd=cwd, env=clean_environment(**environment), **pipes)
    assert started.stdout.readline()
    return started


@pytest.mark.parametrize(
    ('tool', 'number', 'status', 'message'),
    [
        ('train', signal.SIGTERM, 75, 'ended by SIGTERM before the first iteration, so there is nothing to save'),
        ('train', signal.SIGINT, 130, 'interrupted'),
        ('test', signal.SIGTERM, -signal.SIGTERM, ''),
        ('dist_run', signal.SIGTERM, 75, 'ended by SIGTERM before the first iteration, so there is nothing to save'),
    ],
)
def test_signals_while_torch_is_imported(tmp_path, tool, number, status, message):
    (tmp_path / 'torch.py').write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    arguments = ('train', 'a.py', '2') if tool == 'dist_run' else ('a.py',)
    run = start(sys.executable, TOOLS / f'{tool}.py', *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    run.send_signal(number)
    assert run.wait(10) == status
    errors = run.stderr.read()
    assert errors.startswith(message)
    assert errors.count('\n') == bool(message)


def test_sigterm_while_cpp_code_waits(tmp_path):
    """As when the other processes of a training do not come: no Python code runs that could act on the signal.

    A child process that is forked in this time keeps the default action.
    """
    code = """
process['prepare_start'](training=True)
receiver, sender = os.pipe()
child = os.fork()
if not child:
    os.write(sender, b'1')
    time.sleep(60)
    os._exit(0)
os.read(receiver, 1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
mutex = ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
print('waiting', flush=True)
library.pthread_mutex_lock(mutex)
"""
    run = start(sys.executable, '-c', PREPARE + code, cwd=tmp_path)
    time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(10) == 75


@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is Linux')
@pytest.mark.parametrize('killed_before', [False, True])
def test_processes_end_with_their_launcher(tmp_path, killed_before):
    """Also if the launcher is killed before the process can ask the system for the signal."""
    worker = (
        PREPARE
        + f"""
while {killed_before} and os.getppid() == int(os.environ['VHEAT_LAUNCHER']):
    time.sleep(0.01)
process['prepare_start'](training=True)
time.sleep(60)
"""
    )
    launcher = f"""
import os, subprocess, sys, time
os.environ.update(VHEAT_LAUNCHER=str(os.getpid()), TORCHELASTIC_RUN_ID='none')
print(subprocess.Popen([sys.executable, '-c', {worker!r}, '--launcher', 'pytorch']).pid, flush=True)
time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, '-c', launcher], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    pid = int(run.stdout.readline())
    time.sleep(0 if killed_before else 0.5)
    run.kill()
    run.wait()
    end = time.monotonic() + 10
    while Path(f'/proc/{pid}').exists() and ') Z' not in Path(f'/proc/{pid}/stat').read_text():
        assert time.monotonic() < end, os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def test_sigterm_to_the_launcher_while_configs_are_read(tmp_path):
    """Several signals, as a cluster and an impatient user send them: one line, status 75."""
    (tmp_path / 'slow.py').write_text("import time\nprint('reading', flush=True)\ntime.sleep(60)\n")
    run = start(TOOLS / 'dist_train.sh', 'slow.py', '2', cwd=tmp_path)
    assert run.stdout.readline() == 'reading\n'
    for _ in range(3):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert run.wait(30) == 75
    errors = [line for line in run.stderr.read().splitlines() if 'arn' not in line and 'pkg_resources' not in line]
    assert errors[-1].startswith('ended by SIGTERM before the first iteration')
    assert sum('ended by' in line for line in errors) == 1


def test_signals_of_the_config_count_once_it_is_read():
    """Slurm's --signal=USR1 before the first iteration; outside of the tools, nothing is handled so early."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        StopSignalHook(signals=('SIGTERM', 'SIGUSR1'))
        assert [signal.getsignal(number) for number in numbers] == before
        process.exit_on_signals()
        hook = StopSignalHook(signals=('SIGTERM', 'SIGUSR1'))
        assert [signal.getsignal(number) for number in numbers] == [process.exit_before_training] * 2
        hook._previous = dict.fromkeys(numbers, process.exit_before_training)
        hook.after_train(None)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2  # all is saved
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
