"""Checkpoints that are complete even if the run is killed while it saves; a full disk does not end the run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from vheat_mm.checkpoint.resume import LAST, find_newest, stale_parts
from vheat_mm.engine.fileio import AtomicLocalBackend
from vheat_mm.engine.finite_state import FiniteState
from vheat_mm.engine.hooks.readable_checkpoint_hook import ReadableCheckpointHook
from vheat_mm.engine.runner.log_writes import ignore_log_write_errors
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import CheckpointError

INTERRUPTED = 'interrupted.pth'  # one name, so that repeated interruptions do not fill the disk
SUPERFLUOUS = 'superfluous_ckpt_id'  # in the message hub, beside MMEngine's keep_ckpt_ids

# A name of its own leaves MMEngine's 'local' backend as it is.
register_backend('vheat_atomic', AtomicLocalBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook`` with the same arguments; no failure or kill destroys an earlier checkpoint.

    - A checkpoint is written to a temporary file, flushed to the disk and renamed; then ``last_checkpoint`` likewise.
    - Checkpoints that ``max_keep_ckpts`` or a better one replaces are removed after the new one is written.
    - A save that fails (disk full, over quota, storage unavailable) is an error in the log, and training continues.
      The run fails only if the last save fails. Errors of writing scalars to the log are ignored, too.
    - A state that is not finite is not saved, so it replaces no checkpoint: the run ends and names the first tensor.
    - Resuming takes the newest intact checkpoint (:func:`vheat_mm.checkpoint.resume.find_newest`), where MMEngine's
      ``resume=True`` would take a damaged one.

    For local folders. In a remote storage, only the order of writing and removing changes.
    """

    _failed: OSError | None = None
    _readable: ReadableCheckpointHook | None = None
    _saved_iterations = -1  # of the last checkpoint; known to rank 0
    _finite: FiniteState | None = None  # from before_train on
    _meta: dict = {}  # noqa: RUF012 (replaced, never changed in place)
    # Attributes of MMEngine's class, which declares no types.
    backend_args: dict | None
    file_backend: Any
    last_ckpt: str | None

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from if ``resume=True`` names none."""
        if self._readable is None:
            self._readable = ReadableCheckpointHook()
            runner.register_hook(self._readable)
        if runner._resume and runner._load_from is None:
            runner._load_from, notes = find_newest(runner.work_dir)
            runner._resume = runner._load_from is not None
            if not runner._resume:
                notes.append(f'no checkpoint to resume from in {runner.work_dir}: training starts from the beginning')
            for note in notes:
                runner.logger.warning(note)

    def before_train(self, runner: Runner) -> None:
        """Choose the file backend, and remove temporary files of killed processes."""
        folder = self.out_dir or runner.work_dir
        if not (self.backend_args or self.file_client_args or '://' in folder):
            self.backend_args = dict(backend='vheat_atomic')
        super().before_train(runner)
        self._finite = FiniteState(runner)
        ignore_log_write_errors(runner)
        # The process may have been killed between writing a checkpoint and removing the one it replaced.
        if (step := runner.message_hub.runtime_info.get(SUPERFLUOUS)) not in getattr(self, 'keep_ckpt_ids', ()):
            self._remove_step(step)
        _check_same_iteration(runner)
        if is_main_process():
            for part in {*stale_parts(self.out_dir), *stale_parts(runner.work_dir)}:
                part.unlink(missing_ok=True)
                runner.logger.info(f'{part} removed: temporary file of a killed process')

    def after_train(self, runner: Runner) -> None:
        """Retry the last save if it failed. Raises OSError if it fails again.

        A training that was stopped early (by ``EarlyStoppingHook``) is saved here: MMEngine saves the last epoch only.
        """
        early = is_main_process() and runner.train_loop.stop_training is True and self._saved_iterations != runner.iter
        if self.save_last and any_rank(self._failed is not None or early):
            if not early:
                runner.logger.warning('the last checkpoint could not be written: retrying')
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, meta)
            if self._failed is not None:
                raise self._failed
        super().after_train(runner)

    def save_interrupted(self, runner: Runner, finished_iterations: int) -> str | None:
        """Save the training state at any iteration; returns the path, or ``None`` if it could not be written."""
        meta = dict(epoch=runner.epoch, iter=finished_iterations)
        return self._save(runner, INTERRUPTED, meta)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        hub, kept = runner.message_hub, list(getattr(self, 'keep_ckpt_ids', ()))
        superfluous = None
        if self.max_keep_ckpts > 0 and (not kept or kept[-1] != step):
            superfluous = kept[0] if len(kept) == self.max_keep_ckpts else None
            self.keep_ckpt_ids.append(step)  # a full deque drops its first element
            hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            hub.update_info(SUPERFLUOUS, superfluous)
        if self._save(runner, self.filename_tmpl.format(step), meta) is not None:
            self._remove_step(superfluous)
        elif self.max_keep_ckpts > 0:  # the old checkpoint stays and is still counted
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)
            hub.update_info('keep_ckpt_ids', kept)
            hub.update_info(SUPERFLUOUS, None)

    def _remove_step(self, step: int | None) -> None:
        if step is not None and is_main_process():
            _remove(self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _save(self, runner: Runner, name: str, meta: dict) -> str | None:
        """Write a checkpoint, then ``last_checkpoint``; returns the path, or ``None`` if it could not be written."""
        assert self._finite is not None
        self._finite.require(self.last_ckpt)
        path, before = self.file_backend.join_path(self.out_dir, name), self.last_ckpt
        runner.message_hub.update_info('last_ckpt', path)
        runner.call_hook('before_collective_save')  # on all ranks; MMEngine's before_save_checkpoint is on rank 0
        self._meta = dict(meta)  # FlexibleRunner changes the one that it gets
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        except OSError as error:
            self._failed = error
            runner.message_hub.update_info('last_ckpt', before)
            _log_failed_save(runner, path, error)
            return None
        finally:
            self._meta = {}
        self._failed, self.last_ckpt = None, path
        self._saved_iterations = meta.get('iter', -1)  # the runner has set it
        if is_main_process():
            try:
                AtomicLocalBackend().put_text(path, Path(runner.work_dir) / LAST)
            except OSError as error:  # find_newest does not need this file
                _log_failed_save(runner, LAST, error)
            if name != INTERRUPTED:  # the new checkpoint is newer than the interrupted state
                _remove(self.file_backend, self.file_backend.join_path(self.out_dir, INTERRUPTED))
        return path

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the epoch and iteration of the checkpoint, which ``FlexibleRunner`` overwrites."""
        checkpoint['meta'].update(self._meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best or self._finite is None:  # a validation without a training saves nothing
            return
        self._finite.require(self.last_ckpt)
        before, info = self._best(), dict(runner.message_hub.runtime_info)
        backend, self.file_backend = self.file_backend, _DeferredRemoval(self.file_backend)
        deferred = self.file_backend
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:  # the earlier file still exists and remains the best
            if hasattr(self, 'best_ckpt_path'):
                self.best_ckpt_path = before['best']
            else:
                self.best_ckpt_path_dict = before
            runner.message_hub.runtime_info.clear()
            runner.message_hub.runtime_info.update(info)
            _log_failed_save(runner, 'the best checkpoint', error)
            return
        finally:
            self.file_backend = backend
        for path in set(deferred.paths) - set(self._best().values()):
            _remove(backend, path)

    def _best(self) -> dict[str, Any]:
        if hasattr(self, 'best_ckpt_path_dict'):
            return dict(self.best_ckpt_path_dict)
        return dict(best=getattr(self, 'best_ckpt_path', None))


class _DeferredRemoval:
    """A file backend that collects the paths to remove instead of removing them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Collect a path."""
        self.paths.append(path)

    rmtree = remove


def _check_same_iteration(runner: Runner) -> None:
    """Raise CheckpointError if processes resumed at different iterations."""
    places = all_gather_object((runner.epoch, runner.iter))
    if len(set(places)) > 1:
        raise CheckpointError(
            f'processes have resumed at different (epoch, iteration): {places}; their work_dir {runner.work_dir!r} '
            'must be the same folder on all machines'
        )


def _log_failed_save(runner: Runner, what: str, error: OSError) -> None:
    runner.logger.error(
        f'could not save {what}: {error}. Earlier checkpoints are unchanged and training continues; '
        'free disk space before the next save'
    )


def _remove(backend: Any, path: str) -> None:
    with contextlib.suppress(OSError):  # already removed, or no permission
        if backend.isfile(path):
            backend.remove(path)
        elif backend.isdir(path):  # DeepSpeed's checkpoints
            backend.rmtree(path)
