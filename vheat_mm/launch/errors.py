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

from ..checkpoint import CheckpointError
from ..hooks import AnnotationError, NonFiniteError, StopRequested
from ..hooks.stop_signal import REQUEUE
from ..loading import BrokenSampleError
from ..tta import ViewError

SHOW_TRACEBACK = 'VHEAT_TRACEBACK'
# Status of a run that ended with a message; a crash with a traceback has Python's 1.
USER_ERROR = 2
INTERRUPTED = 130

# How a process notices that another one has gone.
_SECONDARY = re.compile(r'gloo|nccl|connection (closed|reset)|tcpstore|broken pipe|process group', re.IGNORECASE)


class ToolError(Exception):
    """Wrong use of a tool, with the remedy in its message."""


# What the user can mend: told in one message, without a traceback.
_KNOWN = (ToolError, CheckpointError, AnnotationError, BrokenSampleError, NonFiniteError, ViewError, OSError)


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
        known = isinstance(error, _KNOWN)
        if phase.finished and not known:
            raise
        if os.environ.get(SHOW_TRACEBACK) == '1':
            traceback.print_exc()
        hint = '' if known else f'\n(set {SHOW_TRACEBACK}=1 to see where it comes from)'
        print(f'error: {describe(error)}{hint}', file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


def describe(error: BaseException) -> str:
    """An error as a sentence: its text, after its kind where the text alone would be cryptic."""
    # KeyError quotes its only argument when printed.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if text == 'need at least one array to concatenate':  # what MMEngine's data sets say when they hold nothing
        return _describe_empty_dataset(error)
    if 'DataLoader worker' in text:  # the worker's traceback as text: its last line is the error
        text = text.strip().splitlines()[-1]
        text = re.sub(r'^[\w.]*(?:OSError|AnnotationError|BrokenSampleError): ', '', text)
    speaking = (*_KNOWN, ValueError, RuntimeError)
    if isinstance(error, speaking) and text:
        return text
    if not text:  # a bare assertion: its place says more than nothing
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f'{frame.line} (line {frame.lineno} of {frame.filename})'
    return f'{type(error).__name__}: {text}'


def _describe_empty_dataset(error: BaseException) -> str:
    """Where the data set whose loading failed has looked for samples."""
    looked = ''
    for frame, _ in traceback.walk_tb(error.__traceback__):
        dataset = frame.f_locals.get('self')
        if hasattr(dataset, 'data_prefix'):
            names = ('ann_file', 'data_prefix', 'img_suffix')
            places = [f'{name}={getattr(dataset, name)!r}' for name in names if hasattr(dataset, name)]
            looked = f': {type(dataset).__name__} with {", ".join(places)}'
    return f'a data set is empty{looked}; check its paths, the suffix of its images, and filter_cfg'


def process_rank() -> int:
    """Rank of this process as its launcher tells it, 0 without launcher."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _let_others_go_first(error: Exception) -> None:
    """Wait where another process has more to say: the launcher ends us as soon as that one is gone.

    All processes meet most errors, and the first one speaks for them. A lost connection is another process's error.
    """
    if process_count() > 1:
        secondary = _SECONDARY.search(str(error)) is not None
        time.sleep((6 if secondary else 0) + (2 if process_rank() else 0))


def process_count() -> int:
    """Number of processes as the launcher tells it, 1 without launcher."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if name in os.environ:
            return int(os.environ[name])
    return 1
