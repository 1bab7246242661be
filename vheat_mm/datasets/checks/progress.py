"""How far a check has come, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

# Seconds between lines where stderr is a file.
_INTERVAL = 30.0


class Progress:
    """A bar on a terminal, a line now and then elsewhere.

    Args:
        total: Number of steps.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._bar = None
        self._started = self._spoken = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn('checking files'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task('', total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif (now := time.monotonic()) - self._spoken > _INTERVAL:
            self._spoken = now
            rate = self._done / (now - self._started)
            print(f'checked {self._done} of {self._total} files, {rate:.0f} a second', file=sys.stderr, flush=True)
