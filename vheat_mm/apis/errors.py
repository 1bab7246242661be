"""One clear message where a run cannot go on, instead of a traceback."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from mmengine.hooks import Hook
from mmengine.runner import Runner

from vheat_mm.utils.dist import process_count, process_rank
from vheat_mm.utils.errors import REQUEUE, USER_ERRORS, StopRequested, describe

SHOW_TRACEBACK = 'VHEAT_TRACEBACK'
# Status of a run that ended with a message; a crash with a traceback has Python's 1.
USER_ERROR = 2
INTERRUPTED = 130

# How a process notices that another one has gone.
_SECONDARY = re.compile(r'gloo|nccl|connection (closed|reset)|tcpstore|broken pipe|process group', re.IGNORECASE)


class SetupEndHook(Hook):
    """Notes that set-up is over, after which an unknown error is a bug and keeps its traceback."""

    priority = 'LOWEST'
    finished = False

    def before_train(self, runner: Runner) -> None:
        """End of set-up for training."""
        self.finished = True

    def before_test(self, runner: Runner) -> None:
        """End of set-up for testing."""
        self.finished = True


def run_reporting_errors(body: Callable[[SetupEndHook], None]) -> int:
    """Run ``body`` and turn its errors into messages on stderr.

    Args:
        body: The tool. It registers the hook it is given with the runner.

    Returns:
        The exit status.

    Raises:
        Exception: One that is neither from set-up nor of a kind that the user can mend.
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
        _let_others_go_first(error)
        known = isinstance(error, USER_ERRORS)
        if phase.finished and not known:
            raise
        if os.environ.get(SHOW_TRACEBACK) == '1':
            traceback.print_exc()
        hint = '' if known else f'\n(set {SHOW_TRACEBACK}=1 to see where it comes from)'
        print(f'error: {describe(error)}{hint}', file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


def _let_others_go_first(error: Exception) -> None:
    """Wait where another process has more to say: the launcher ends us as soon as that one is gone.

    All processes meet most errors, and the first one speaks for them. A lost connection is another process's error.
    """
    if process_count() > 1:
        secondary = _SECONDARY.search(str(error)) is not None
        time.sleep((6 if secondary else 0) + (2 if process_rank() else 0))
