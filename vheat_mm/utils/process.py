"""This process: its rank, its end with its parent, and SIGTERM before the first iteration of a training.

Only the standard library is used: the tools run this file by its path before they import torch, which takes seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 130  # the shell's status for SIGINT
LAUNCHER = 'VHEAT_LAUNCHER'  # process id of tools/dist_run.py, set by it
STOP_NOTE = 'VHEAT_STOP_NOTE'  # file that tells the launcher, while it exists, that SIGTERM loses nothing
NOTHING_TO_SAVE = 'before the first iteration, so there is nothing to save; start again with --resume'
PR_SET_PDEATHSIG = 1  # of prctl(2)
Handler = Callable[[int, FrameType | None], None]


def process_rank() -> int:
    """Rank of this process from the launcher's environment variables, 0 without a launcher."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def process_count() -> int:
    """Number of processes from the launcher's environment variables, 1 without a launcher."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def end_with_parent(number: int, parent: int | None) -> None:
    """Let the system send this process a signal when its parent process ends, however that ends (Linux only).

    Args:
        number: The signal.
        parent: Process id of the parent; if it has ended already, the signal is sent at once.
    """
    if sys.platform != 'linux':
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def prepare_start(training: bool) -> None:
    """For the first lines of a tool: what signals do until :func:`~vheat_mm.apis.errors.run_reporting_errors` runs.

    SIGINT ends the process with status 130, SIGTERM a training with status 75. A process that torchrun has started
    gets SIGTERM when torchrun is killed; without that it would go on training alone.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_interrupted)
    if training:
        exit_on_signals()
    # The processes that torchrun has started start others, which inherit the environment.
    if 'TORCHELASTIC_RUN_ID' in os.environ and {'pytorch', '--launcher=pytorch'} & set(sys.argv):
        launcher = os.environ.get(LAUNCHER)
        end_with_parent(signal.SIGTERM, int(launcher) if launcher else None)


def exit_on_signals(numbers: Sequence[int] = (signal.SIGTERM,)) -> None:
    """Let signals end this process with status 75 until another handler replaces this one.

    Nothing has to be cleaned up: what a training writes during set-up survives SIGKILL as well. Only the main thread
    can set handlers; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if not _watched and hasattr(os, 'register_at_fork'):  # not on Windows
        _watched.append(True)
        # Python calls handlers in the main thread, between two of its own instructions. The connection to the other
        # processes may wait there for minutes in C++, so a thread acts on the signals, too.
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(receiver,), daemon=True).start()
    handle_signals(numbers, exit_before_training)
    if note := os.environ.get(STOP_NOTE):
        with contextlib.suppress(OSError):
            Path(note).touch()


def exit_before_training(number: int, _: FrameType | None = None) -> None:
    """The handler of :func:`exit_on_signals`. With tools/dist_run.py, that process prints the message."""
    if not _exiting.acquire(blocking=False):  # the other thread is about to end this process
        return
    if process_rank() == 0 and os.environ.get(LAUNCHER) in (None, str(os.getpid())):
        os.write(2, f'ended by {signal.Signals(number).name} {NOTHING_TO_SAVE}\n'.encode())
    os._exit(REQUEUE)


_watched: list[bool] = []
_exiting = threading.Lock()


def _watch(receiver: int) -> None:
    while received := os.read(receiver, 1):
        if signal.getsignal(received[0]) is exit_before_training:
            exit_before_training(received[0], None)


def handle_signals(numbers: Iterable[int], handler: Handler) -> dict[int, Any]:
    """Set the handler of signals in this process; processes that are forked from it get the default ones.

    mmdet's ``VOCMetric`` ends its pool by SIGTERM and waits for it. With a copy of the handler, a process of the pool
    would go on; and Python drops signals that a process receives while it is forked, so they are blocked then.

    Returns:
        The previous handlers.
    """
    if not _handled and hasattr(os, 'register_at_fork'):  # not on Windows
        os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_unblock_in_child)
    _handled.update(numbers)
    return {number: signal.signal(number, handler) for number in numbers}


_handled: set[int] = set()
_forking = threading.local()


def _block() -> None:
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handled)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _unblock_in_child() -> None:
    for number in _handled:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    _unblock()


def _exit_interrupted(*_: object) -> None:
    if process_rank() == 0:
        os.write(2, b'interrupted\n')
    os._exit(INTERRUPTED)
