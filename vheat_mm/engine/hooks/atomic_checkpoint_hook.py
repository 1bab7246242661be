"""Checkpoints that are always whole, whatever ends the run, and a full disk that ends none."""

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
from vheat_mm.engine.hooks.accumulation import COLLECT
from vheat_mm.engine.hooks.log_guard import outlive_full_disk
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import CheckpointError

INTERRUPTED = 'interrupted.pth'  # overwritten by each interruption, so that they do not pile up
SUPERFLUOUS = 'superfluous_ckpt_id'  # in the message hub, beside MMEngine's keep_ckpt_ids


register_backend('vheat_atomic', AtomicLocalBackend, force=True)  # under a name of its own: nothing else changes


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with the same arguments, in an order of steps that loses nothing.

    - A checkpoint is written beside its place, flushed to the disk and renamed; ``last_checkpoint`` follows, likewise.
    - Checkpoints that ``max_keep_ckpts`` or a better one make superfluous go after the new one is there, not before.
    - A save that fails (disk full, quota, storage away) is an error in the log, and training goes on to the next one.
      Only where the last save of the run fails does the run fail. Scalars that cannot be logged end none, either.
    - Resuming takes the newest checkpoint that is whole (:func:`vheat_mm.checkpoint.resume.find_newest`), also where MMEngine's
      ``resume=True`` would take a damaged one.

    Applies to local folders. A remote storage writes whole objects itself; there only the order of steps is ours.
    """

    _failed: OSError | None = None
    _meta: dict = {}  # noqa: RUF012 (never changed, only replaced)
    # Of MMEngine's class, which sets them without a type.
    backend_args: dict | None
    file_backend: Any
    last_ckpt: str | None

    def before_run(self, runner: Runner) -> None:
        """Choose the checkpoint to resume from, where MMEngine was left to choose."""
        if runner._resume and runner._load_from is None:
            runner._load_from, notes = find_newest(runner.work_dir)
            runner._resume = runner._load_from is not None
            if not runner._resume:
                notes.append(f'nothing to resume from in {runner.work_dir}: training starts from the beginning')
            for note in notes:
                runner.logger.warning(note)

    def before_train(self, runner: Runner) -> None:
        """Choose the file backend, and remove what a killed process was writing."""
        folder = self.out_dir or runner.work_dir
        if not (self.backend_args or self.file_client_args or '://' in folder):
            self.backend_args = dict(backend='vheat_atomic')
        super().before_train(runner)
        outlive_full_disk(runner)
        # Killed after writing a checkpoint, and before removing the one that it made superfluous.
        if (step := runner.message_hub.runtime_info.get(SUPERFLUOUS)) not in getattr(self, 'keep_ckpt_ids', ()):
            self._remove_step(step)
        _check_alike(runner)
        if is_main_process():
            for part in {*stale_parts(self.out_dir), *stale_parts(runner.work_dir)}:
                part.unlink(missing_ok=True)
                runner.logger.info(f'{part} removed: a process was killed while writing it')

    def after_train(self, runner: Runner) -> None:
        """Try once more to save what could not be saved at the end. Raises OSError where it fails again."""
        if self.save_last and any_rank(self._failed is not None):
            runner.logger.warning('the last checkpoint could not be written: trying once more')
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            step = runner.epoch if self.by_epoch else runner.iter
            self._save_checkpoint_with_step(runner, step, meta)
            if self._failed is not None:
                raise self._failed
        super().after_train(runner)

    def save_interrupted(self, runner: Runner, finished_iterations: int) -> str | None:
        """Save the state of training at any iteration; returns the path, ``None`` where it could not be written."""
        meta = dict(epoch=runner.epoch, iter=finished_iterations)
        return self._save(runner, INTERRUPTED, meta)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        hub, kept = runner.message_hub, list(getattr(self, 'keep_ckpt_ids', ()))
        superfluous = None
        if self.max_keep_ckpts > 0 and (not kept or kept[-1] != step):
            superfluous = kept[0] if len(kept) == self.max_keep_ckpts else None
            self.keep_ckpt_ids.append(step)  # drops the first where it is full
            hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            hub.update_info(SUPERFLUOUS, superfluous)
        if self._save(runner, self.filename_tmpl.format(step), meta) is not None:
            self._remove_step(superfluous)
        elif self.max_keep_ckpts > 0:  # what was to go stays, and counts
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(kept)
            hub.update_info('keep_ckpt_ids', kept)
            hub.update_info(SUPERFLUOUS, None)

    def _remove_step(self, step: int | None) -> None:
        if step is not None and is_main_process():
            _remove(self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _save(self, runner: Runner, name: str, meta: dict) -> str | None:
        """Write a checkpoint, then the file that names it; returns the path, ``None`` where that failed."""
        path, before = self.file_backend.join_path(self.out_dir, name), self.last_ckpt
        runner.message_hub.update_info('last_ckpt', path)
        runner.call_hook(COLLECT)
        self._meta = meta
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
            _report(runner, path, error)
            return None
        finally:
            self._meta = {}
        self._failed, self.last_ckpt = None, path
        if is_main_process():
            try:
                AtomicLocalBackend().put_text(path, Path(runner.work_dir) / LAST)
            except OSError as error:  # resuming finds the checkpoint without it
                _report(runner, LAST, error)
            if name != INTERRUPTED:  # training has left that state behind
                _remove(self.file_backend, self.file_backend.join_path(self.out_dir, INTERRUPTED))
        return path

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put back what ``FlexibleRunner`` writes over: the place in training that the checkpoint is of."""
        checkpoint['meta'].update(self._meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        before, info = self._best(), dict(runner.message_hub.runtime_info)
        backend, self.file_backend = self.file_backend, _LaterRemoving(self.file_backend)
        later = self.file_backend
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:  # the earlier best one is still there, and remains the best
            if hasattr(self, 'best_ckpt_path'):
                self.best_ckpt_path = before['best']
            else:
                self.best_ckpt_path_dict = before
            runner.message_hub.runtime_info.clear()
            runner.message_hub.runtime_info.update(info)
            _report(runner, 'the best checkpoint', error)
            return
        finally:
            self.file_backend = backend
        for path in set(later.superfluous) - set(self._best().values()):
            _remove(backend, path)

    def _best(self) -> dict[str, Any]:
        if hasattr(self, 'best_ckpt_path_dict'):
            return dict(self.best_ckpt_path_dict)
        return dict(best=getattr(self, 'best_ckpt_path', None))


class _LaterRemoving:
    """A file backend that only notes what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.superfluous: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Note a file."""
        self.superfluous.append(path)

    rmtree = remove


def _check_alike(runner: Runner) -> None:
    """Raise CheckpointError where processes have resumed from different places."""
    places = all_gather_object((runner.epoch, runner.iter))
    if len(set(places)) > 1:
        raise CheckpointError(
            f'processes have resumed at different (epoch, iteration): {places}; their work_dir {runner.work_dir!r} '
            'must be the same folder on all machines'
        )


def _report(runner: Runner, what: str, error: OSError) -> None:
    runner.logger.error(
        f'could not save {what}: {error}. What was there before is untouched, and training goes on; '
        'make room before the next save'
    )


def _remove(backend: Any, path: str) -> None:
    with contextlib.suppress(OSError):  # gone already, or not ours to remove: no reason to end a run
        if backend.isfile(path):
            backend.remove(path)
        elif backend.isdir(path):  # DeepSpeed's checkpoints
            backend.rmtree(path)
