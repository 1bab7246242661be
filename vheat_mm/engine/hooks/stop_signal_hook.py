"""On SIGTERM, save and exit with a status on which a scheduler can restart the job."""

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
from mmengine.runner import Runner

from vheat_mm.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from vheat_mm.engine.runner.data_loading import WorkerInit, train_loader
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import StopRequested
from vheat_mm.utils.process import STOP_NOTE, exit_before_training, exit_on_signals, handle_signals


@HOOKS.register_module()
class StopSignalHook(Hook):
    """On SIGTERM, finish the iteration, save ``interrupted.pth`` and exit with status 75.

    All processes exit after the same iteration, even if only one receives the signal. A validation is finished first,
    but the training state is saved at once, because SIGKILL may follow before the end. Further signals are ignored.
    The tools handle SIGTERM from their first line on: before the first iteration, it gives status 75, too.

    Args:
        signals: Names of the signals; with Slurm's ``--signal=USR1@120`` add ``'SIGUSR1'``.

    Raises:
        ValueError: No such signal.
    """

    priority = 'LOWEST'  # after the checkpoint hook and the parameter schedulers

    def __init__(self, signals: Sequence[str] = ('SIGTERM',)) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if isinstance(signals, str) or unknown:
            raise ValueError(f"StopSignalHook: signals={signals!r}, expected names such as ('SIGTERM', 'SIGUSR1')")
        self.signals = [getattr(signal, name) for name in signals]
        self._received: str | None = None
        self._saved: str | None = None
        self._previous: dict[int, Any] = {}
        if signal.getsignal(signal.SIGTERM) is exit_before_training:  # within the tools: from now on, all of them
            exit_on_signals(self.signals)

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers; data-loader workers ignore the signals."""
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('StopSignalHook is inactive: signals can be handled in the main thread only')
            return
        self._previous = handle_signals(self.signals, self._receive)
        if note := os.environ.get(STOP_NOTE):
            Path(note).unlink(missing_ok=True)  # from now on, stopping loses iterations until they are saved
        validation = [runner.val_dataloader] if runner.val_loop is not None else []
        for loader in (train_loader(runner), *validation):
            loader.worker_init_fn = WorkerInit(loader.worker_init_fn)

    def _receive(self, number: int, _: object) -> None:
        self._received = signal.Signals(number).name

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Save and exit if any process has received a signal."""
        if self._previous and any_rank(self._received is not None):
            self._save(runner, runner.iter + 1)
            self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Save at once, in rank 0 alone: ranks may validate different numbers of batches, so none can wait here.

        ``FlexibleRunner`` saves with all ranks, so there it is done after the validation.
        """
        can_save = is_main_process() and isinstance(runner, Runner)
        if self._received is not None and self._saved is None and can_save and self._previous:
            with _training_weights(runner):
                self._write(runner, runner.iter, alone=True)

    def after_val(self, runner: Runner) -> None:
        """Save and exit after the validation if any process has received a signal."""
        if self._previous and any_rank(self._received is not None):
            self._save(runner, runner.iter)
            self._stop(runner, runner.iter)

    def after_train(self, runner: Runner) -> None:
        """Restore the previous signal handlers; in the tools, ignore the signals, because all is saved."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if handler is exit_before_training else handler)
        self._previous = {}

    def _save(self, runner: Runner, finished_iterations: int) -> None:
        """Save; all processes wait until the file is written."""
        self._write(runner, finished_iterations)
        saved = [self._saved]
        broadcast_object_list(saved)
        self._saved = saved[0]

    def _write(self, runner: Runner, finished_iterations: int, alone: bool = False) -> None:
        for hook in runner.hooks:
            if isinstance(hook, AtomicCheckpointHook):
                self._saved = hook.save_interrupted(runner, finished_iterations, alone)
                return
        runner.logger.warning(
            'training state not saved: StopSignalHook needs AtomicCheckpointHook as default_hooks.checkpoint'
        )

    def _stop(self, runner: Runner, finished_iterations: int) -> None:
        reason = self._received or 'a signal to another process'
        state = f'state saved to {self._saved}' if self._saved else 'the state could NOT be saved'
        message = f'ended by {reason} after iteration {finished_iterations}; {state}; continue with --resume'
        runner.logger.warning(message)
        if note := os.environ.get(STOP_NOTE):
            with contextlib.suppress(OSError):
                Path(note).write_text(message, encoding='utf-8')
        for number in self._previous:  # nothing interrupts the exit
            signal.signal(number, signal.SIG_IGN)
        raise StopRequested(message)


@contextlib.contextmanager
def _training_weights(runner: Runner) -> Iterator[None]:
    """Within a validation, swap the training weights back into the model if ``EMAHook`` has swapped in the average."""
    ema_hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in ema_hooks:
        hook._swap_ema_parameters()
    try:
        yield
    finally:
        for hook in ema_hooks:
            hook._swap_ema_parameters()
