"""Predicting a list of inputs: the network in this thread, painting and files in another, and an orderly end."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mmengine.logging import print_log

from vheat_mm.apis.inference.journal import Journal, Stamp, sweep
from vheat_mm.apis.inference.types import Prediction
from vheat_mm.utils.errors import ToolError, describe
from vheat_mm.utils.process import INTERRUPTED, handle_signals, process_rank
from vheat_mm.utils.text import first_line

_AHEAD = 4  # predictions that wait to be written
_LINES = 30.0  # seconds between two lines of progress in a log
_ONE_PRESS = 2.0  # seconds in which torchrun's copy of a signal is not a second one


class Writer(Protocol):
    """Writes results to files."""

    def write(self, prediction: Prediction) -> None:
        """Write one result; of one with an error, at most what ends its video."""

    def close(self) -> None:
        """Complete what is whole and remove what is not."""


class WriterThread:
    """Writes predictions in a thread of its own, and then the journal.

    Args:
        writers: Called one after the other for each prediction. What a writer fails with is an error of that input,
            but for OSError and ToolError, such as a full disk, which end the run.
        journal: Gets a line once all results of an input are written.
        stamps: Of the inputs, by name.
    """

    def __init__(self, writers: Sequence[Writer], journal: Journal, stamps: Mapping[str, Stamp]) -> None:
        self._writers, self._journal, self._stamps = writers, journal, stamps
        self._queue: queue.Queue[Prediction | None] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._count = self._boxes = 0  # images or frames of the present input, and detections in them
        self._failed: str | None = None
        self._thread = threading.Thread(target=self._run, name='writer', daemon=True)
        self._thread.start()

    def put(self, prediction: Prediction) -> None:
        """Have a prediction written soon; waits while several others are to be.

        Raises:
            Exception: What a writer has failed with.
        """
        self._queue.put(prediction)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Wait until all is written, and close the writers.

        Raises:
            Exception: What a writer has failed with.
        """
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (prediction := self._queue.get()) is not None:
            if self._error is None:  # else nothing is written any more, but put() must not wait for ever
                self._attempt(self._write, prediction)
        for writer in self._writers:
            self._attempt(writer.close)
        self._attempt(self._journal.close)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except BaseException as error:
            self._error = self._error or error

    def _write(self, prediction: Prediction) -> None:
        self._failed = prediction.error or self._failed
        for writer in self._writers:
            try:
                writer.write(prediction)
            except (OSError, ToolError):
                raise
            except Exception as error:  # encoders and painting: of this image alone
                self._failed = self._failed or f'a result cannot be written: {first_line(describe(error))}'
        self._count += prediction.error is None
        self._boxes += 0 if prediction.boxes is None else len(prediction.boxes)
        if prediction.last:
            stamp = self._stamps[prediction.item.name]
            self._journal.write(prediction.item, stamp, self._failed, self._count, self._boxes)
            self._count, self._boxes, self._failed = 0, 0, None


class StopSignals:
    """While it is entered, Ctrl-C and SIGTERM ask for an orderly end, and a second Ctrl-C ends the process at once.

    Args:
        folder: Where temporary files are removed before an end at once.

    Attributes:
        number: Of the signal, once there was one.
    """

    def __init__(self, folder: Path) -> None:
        self.number: int | None = None
        self._folder, self._since = folder, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = handle_signals((signal.SIGINT, signal.SIGTERM), self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            again = '; Ctrl-C again ends at once' if number == signal.SIGINT else ''
            if process_rank() == 0:
                os.write(2, f'\n{signal.Signals(number).name}: writing what is predicted{again}\n'.encode())
            return
        copies = 'TORCHELASTIC_RUN_ID' in os.environ and now - self._since < _ONE_PRESS
        if number == signal.SIGINT and not copies:
            for child in multiprocessing.active_children():
                child.kill()
            sweep(self._folder)
            os._exit(INTERRUPTED)


class Progress:
    """Images a second and what is left, as a bar on a terminal and as a line now and then in a log.

    Args:
        total: Inputs to predict.
        shown: Whether this process shows it.
    """

    def __init__(self, total: int, shown: bool = True) -> None:
        self.images = self.inputs = self.broken = 0
        self._total, self._shown, self._bar = total, shown, sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / max(self.seconds, 1e-9)

    def add(self, prediction: Prediction) -> None:
        """Count an image or frame; shows the progress if it is time to."""
        self.images += prediction.error is None
        self.inputs += prediction.last
        self.broken += prediction.last and prediction.error is not None
        if self._shown and time.monotonic() - self._last > (0.2 if self._bar else _LINES):
            self._last = time.monotonic()
            self._show()

    def close(self) -> None:
        """End the bar's line."""
        if self._shown and self._bar:
            self._show()
            print(file=sys.stderr)

    def _show(self) -> None:
        left = self.seconds / max(self.inputs, 1) * (self._total - self.inputs)
        text = f'{self.inputs} of {self._total} inputs, {self.rate:.2f} images/s'
        text += f', {self.broken} broken' if self.broken else ''
        text += f', {datetime.timedelta(seconds=round(left))} left' if self.inputs else ''
        if self._bar:
            share = 30 * self.inputs // max(self._total, 1)
            print(f'\r[{"#" * share:<30}] {text}\x1b[K', end='', file=sys.stderr, flush=True)
        else:
            print_log(text, 'current')


def predict_all(
    predictions: Iterator[Prediction],
    thread: WriterThread,
    progress: Progress,
    stop: StopSignals,
    get_on: Callable[[], None] = lambda: None,
) -> None:
    """Have predictions written until there are no more, a signal comes, or writing fails.

    Args:
        predictions: A generator; it is closed at the end.
        thread: Finished at the end.
        progress: Counts.
        stop: Ends the loop after the present prediction.
        get_on: Called for each prediction.

    Raises:
        Exception: What the prediction or a writer has failed with; what was predicted before is written.
    """
    try:
        for prediction in predictions:
            thread.put(prediction)
            progress.add(prediction)
            get_on()
            if stop.number is not None:
                break
    except Exception:
        if stop.number is None:  # the signal may have ended the loader, too
            raise
    finally:
        if hasattr(predictions, 'close'):
            predictions.close()
        progress.close()
        thread.finish()
