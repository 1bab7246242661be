"""Errors of the command-line tools as one message instead of a traceback."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from vheat_mm.engine.hooks import SetupEndHook
from vheat_mm.utils.dist import process_count, process_rank
from vheat_mm.utils.errors import REQUEUE, USER_ERRORS, StopRequested, describe

SHOW_TRACEBACK = 'VHEAT_TRACEBACK'
# Exit statuses of a run that ended with a message; Python's own status after a traceback is 1.
USER_ERROR = 2
INTERRUPTED = 130

# Errors of a process whose peer has exited.
_LOST_PEER = re.compile(r'gloo|nccl|connection (closed|reset)|tcpstore|broken pipe|process group', re.IGNORECASE)


def run_reporting_errors(body: Callable[[SetupEndHook], None]) -> int:
    """Run ``body`` and print its errors as messages on stderr.

    Args:
        body: The tool. It registers the hook that it receives with its runner.

    Returns:
        The exit status.

    Raises:
        Exception: After set-up, one of a type that the user cannot fix.
    """
    phase = SetupEndHook()
    try:
        body(phase)
    except KeyboardInterrupt:
        if process_rank() == 0:
            print('interrupted', file=sys.stderr)
        return INTERRUPTED
    except StopRequested as stop:
        if process_rank() == 0:
            print(stop.message, file=sys.stderr, flush=True)
        return REQUEUE
    except Exception as error:
        _wait_for_rank0_error(error)
        known = isinstance(error, USER_ERRORS)
        if phase.finished and not known:
            raise
        if os.environ.get(SHOW_TRACEBACK) == '1':
            traceback.print_exc()
        hint = '' if known else f'\n(set {SHOW_TRACEBACK}=1 to see where it comes from)'
        print(f'error: {describe(error)}{hint}', file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


def _wait_for_rank0_error(error: Exception) -> None:
    """Let the process with the original error exit first: the launcher then ends the others before they print theirs.

    If all processes have the same error, rank 0 reports it. A lost connection follows from another process's error.
    """
    if process_count() > 1:
        time.sleep((6 if _LOST_PEER.search(str(error)) else 0) + (2 if process_rank() else 0))
