"""SIGTERM, a cluster's warning: save, and end with a status that a scheduler can start the job again on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from vheat_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from vheat_mm.engine.runner.data_loading import WorkerInit, train_loader
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import StopRequested

STOP_NOTE = 'VHEAT_STOP_NOTE'  # a file that tells the launcher on this machine how the run ended


@HOOKS.register_module()
class StopSignalHook(Hook):
    """On SIGTERM, finish the iteration, save ``interrupted.pth``, and end with status 75.

    All processes end after the same iteration, whichever of them was told. A validation is finished first, but the
    state of training is saved at once, as the time to SIGKILL may not suffice. A second signal changes nothing.

    Args:
        signals: Names of the signals; with Slurm's ``--signal=USR1@120`` add ``'SIGUSR1'``.

    Raises:
        ValueError: No such signal.
    """

    priority = 'LOWEST'  # after the iteration's own checkpoint, and the schedules' steps

    def __init__(self, signals: Sequence[str] = ('SIGTERM',)) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if isinstance(signals, str) or unknown:
            raise ValueError(f"StopSignalHook: signals={signals!r}, expected names such as ('SIGTERM', 'SIGUSR1')")
        self.signals = [getattr(signal, name) for name in signals]
        self._received: str | None = None
        self._saved: str | None = None
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Take the signals over, and let data-loader workers outlive them."""
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('training runs beside the main thread: signals cannot be taken over')
            return
        self._previous = {number: signal.signal(number, self._note) for number in self.signals}
        validation = [runner.val_dataloader] if runner.val_loop is not None else []
        for loader in (train_loader(runner), *validation):
            loader.worker_init_fn = WorkerInit(loader.worker_init_fn)

    def _note(self, number: int, _: object) -> None:
        self._received = signal.Signals(number).name

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """End here, if any process was told to."""
        if self._previous and any_rank(self._received is not None):
            self._save(runner, runner.iter + 1)
            if not _validates_now(runner):  # else it ends afterwards
                self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save at once. Processes may validate different numbers of batches, so none waits for another here.

        Where saving takes all of them (``FlexibleRunner``), it comes after the validation.
        """
        alone = is_main_process() and isinstance(runner, Runner)
        if self._received is not None and self._saved is None and alone and self._previous:
            with _weights_of_training(runner):
                self._write(runner, runner.iter)

    def after_val(self, runner: Runner) -> None:
        """End after the validation, if any process was told to."""
        if self._previous and any_rank(self._received is not None):
            self._save(runner, runner.iter)
            self._stop(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Give the signals back."""
        self._restore()

    def _save(self, runner: Runner, finished_iterations: int) -> None:
        """Save with all processes, none of which goes on before the file is whole."""
        self._write(runner, finished_iterations)
        saved = [self._saved]
        broadcast_object_list(saved)
        self._saved = saved[0]

    def _write(self, runner: Runner, finished_iterations: int) -> None:
        for hook in runner.hooks:
            if isinstance(hook, AtomicCheckpointHook):
                self._saved = hook.save_interrupted(runner, finished_iterations)
                return
        runner.logger.warning('nothing saved: StopSignalHook needs AtomicCheckpointHook as default_hooks.checkpoint')

    def _stop(self, runner: Runner, finished_iterations: int) -> None:
        told = self._received or 'a signal to another process'
        state = f'state saved to {self._saved}' if self._saved else 'the state could NOT be saved'
        message = f'ended by {told} after iteration {finished_iterations}; {state}; continue with --resume'
        runner.logger.warning(message)
        if note := os.environ.get(STOP_NOTE):
            with contextlib.suppress(OSError):
                Path(note).write_text(message, encoding='utf-8')
        for number in self._previous:  # until the process has ended
            signal.signal(number, signal.SIG_IGN)
        raise StopRequested(message)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _validates_now(runner: Runner) -> bool:
    """Whether an iteration-based loop validates after this iteration, without being asked again on resume."""
    loop, done = runner.train_loop, runner.iter + 1
    if not isinstance(loop, IterBasedTrainLoop) or runner.val_loop is None or done < loop.val_begin:
        return False
    return done % loop.val_interval == 0 or done == loop.max_iters


@contextlib.contextmanager
def _weights_of_training(runner: Runner) -> Iterator[None]:
    """Within a validation, have the model hold the weights it trains and not their average."""
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in averages:
        hook._swap_ema_parameters()
    try:
        yield
    finally:
        for hook in averages:
            hook._swap_ema_parameters()
