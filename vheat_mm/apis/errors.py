"""Errors of the command-line tools: the last line on stderr says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mmengine.runner.base_loop import BaseLoop

from vheat_mm.utils.config_place import explain
from vheat_mm.utils.errors import REQUEUE, USER_ERRORS, ArgumentError, StopRequested, VHeatError, describe
from vheat_mm.utils.process import INTERRUPTED, STOP_NOTE, process_count, process_rank

SHOW_TRACEBACK = 'VHEAT_TRACEBACK'
# Exit statuses of a run that ended with a message; Python's own status after a traceback is 1.
USER_ERROR, UNKNOWN_ERROR = 2, 1
LONGEST = 800  # characters of an error of another package, which may hold the whole config

# Errors that may follow from the end of another process, and errors that do.
_LOST_PEER = re.compile(r'gloo|nccl|connection (closed|reset)|tcpstore|broken pipe|process group', re.IGNORECASE)
_CLOSED = re.compile(r'connection (closed|reset) by peer|broken pipe|remote process exited', re.IGNORECASE)


def run_reporting_errors(body: Callable[[], None]) -> int:
    """Run ``body`` and print its errors as messages on stderr.

    Of several processes one prints. After set-up, an error that the user cannot fix is printed with its traceback.

    Args:
        body: The tool.

    Returns:
        The exit status.
    """
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # instead of that of utils.process.prepare_start
    try:
        body()
    except KeyboardInterrupt:
        if process_rank() == 0:
            print('interrupted', file=sys.stderr)
        return INTERRUPTED
    except StopRequested as stop:
        if process_rank() == 0:
            print(stop.message, file=sys.stderr, flush=True)
        return REQUEUE
    except Exception as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher may end this process while it waits
        _wait_for_rank0_error(error)
        known = isinstance(error, USER_ERRORS)
        bug = not known and _is_after_setup(error) and not _is_lost_peer(error)
        sys.stdout.flush()  # in a common log file, the message comes last
        if not _is_first_to_report():
            return UNKNOWN_ERROR if bug else USER_ERROR
        if bug or os.environ.get(SHOW_TRACEBACK) == '1':
            traceback.print_exc()
        hint = '' if known or bug else f' ({SHOW_TRACEBACK}=1 shows where it comes from)'
        print(f'error: {_message(error)}{hint}', file=sys.stderr, flush=True)
        return UNKNOWN_ERROR if bug else USER_ERROR
    return 0


def _message(error: Exception) -> str:
    """The message in one line, after the place in the config from which it comes."""
    if isinstance(error, ArgumentError):
        return error.of_command()
    if isinstance(error, VHeatError):
        return describe(error)
    place, message = explain(error)
    message = ' '.join((message or describe(error)).split())
    if _is_lost_peer(error):
        return f'another process of this run has ended, see what it printed above ({message[:150]} ...)'
    if len(message) > LONGEST:
        message = f'{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}'
    return f'{place}: {message}' if place else message


def _wait_for_rank0_error(error: Exception) -> None:
    """Let the process with the original error exit first: the launcher then ends the others before they print theirs.

    If all processes have the same error, rank 0 reports it. A lost connection follows from another process's error.
    """
    if process_count() > 1:
        time.sleep((6 if _LOST_PEER.search(str(error)) else 0) + (2 if process_rank() else 0))


def _is_first_to_report() -> bool:
    """Whether no other process of tools/dist_run.py on this machine has printed its error since the last (re)start."""
    if STOP_NOTE not in os.environ:
        return True
    try:
        Path(f'{os.environ[STOP_NOTE]}.error{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}').touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher was killed, or the disk is full
        return True
    return True


def _is_after_setup(error: BaseException) -> bool:
    """Whether a training, validation or test had begun; its first hooks are part of the set-up."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = any(
        isinstance(frame.f_locals.get('self'), BaseLoop) and frame.f_code.co_name == 'run' for frame in frames
    )
    return running and not any(frame.f_code.co_name in ('before_train', 'before_test') for frame in frames)


def _is_lost_peer(error: Exception) -> bool:
    return process_count() > 1 and _CLOSED.search(str(error)) is not None
