"""Checkpoints that are complete even if the run is killed while it saves; a full disk does not end the run."""

from __future__ import annotations

import contextlib
import inspect
import os
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.fileio import register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop

from vheat_mm.checkpoint.resume import INTERRUPTED, NO_STATE, RUN_ID, find_newest, place_of
from vheat_mm.checkpoint.run import Run
from vheat_mm.checkpoint.run_folder import LAST, RUN_FILE
from vheat_mm.engine.fileio import AtomicLocalBackend, drop_code
from vheat_mm.engine.finite_state import FiniteState
from vheat_mm.engine.hooks.readable_checkpoint_hook import ReadableCheckpointHook
from vheat_mm.engine.runner.log_writes import ignore_log_write_errors
from vheat_mm.engine.runner.resumed_state import check_state
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import CheckpointError

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
    - Each run has an id, in ``run.json`` and in its checkpoints. ``resume=True`` takes the newest intact checkpoint
      with that id (:func:`vheat_mm.checkpoint.resume.find_newest`), where MMEngine would take any file that
      ``last_checkpoint`` names. A second training in the same work dir is refused.
    - Only files that bear this id are removed, whatever paths a checkpoint names.

    For local folders. In a remote storage, only the order of writing and removing changes.
    """

    _failed: OSError | None = None
    _readable: ReadableCheckpointHook | None = None
    _saved_iterations = -1  # of the last checkpoint; known to rank 0
    _finite: FiniteState | None = None  # from before_train on
    _run: Any = None  # a Run, from start() on
    _loaded_id: str | None = None  # of the run that wrote the checkpoint which was loaded
    _folders: set[str] = set()  # noqa: RUF012 (replaced; DeepSpeed's checkpoints that this process wrote)
    _meta: dict = {}  # noqa: RUF012 (replaced, never changed in place)
    # Attributes of MMEngine's class, which declares no types.
    backend_args: dict | None
    file_backend: Any
    last_ckpt: str | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        known = inspect.signature(Runner.save_checkpoint).parameters
        if unknown := [name for name in self.args if name not in known]:  # MMEngine finds out when it saves
            raise TypeError(f'AtomicCheckpointHook got an unexpected keyword argument {unknown[0]!r}')

    def before_run(self, runner: Runner) -> None:
        """Begin the run; for a validation or a test, only choose the checkpoint if ``resume=True`` names none."""
        if self._readable is None:
            self._readable = ReadableCheckpointHook()
            runner.register_hook(self._readable)
        if isinstance(runner._train_loop, BaseLoop):
            self.start(runner)
        elif runner._resume and runner._load_from is None:
            runner._load_from, notes = find_newest(runner.work_dir, self._folder(runner), self.filename_tmpl)
            runner._resume = runner._load_from is not None
            for note in notes:
                runner.logger.warning(note)

    def start(self, runner: Runner) -> None:
        """Begin the run: lock the work dir, choose what to resume from, take over its seed; once per training.

        ``tools/train.py`` calls this early, because ``FlexibleRunner`` loads before it calls ``before_run``.

        Raises:
            ToolError: Another process trains in the work dir.
            CheckpointError: There is no checkpoint to resume from where there must be one.
        """
        if self._run is not None and self._run.started:
            return
        self._folders = set()
        self._run = Run(runner.work_dir, self._folder(runner), self.filename_tmpl)
        path, place, notes = self._run.begin(
            runner._resume, runner._load_from if runner._resume else None, runner._has_loaded
        )
        for note in notes:
            runner.logger.warning(note)
        if path is not None:
            runner._load_from, runner._resume = path, True
            where = f', epoch {place.epoch}, iteration {place.iteration}' if place and place.epoch >= 0 else ''
            runner.logger.info(f'resuming from {path}{where}')
        elif not runner._has_loaded:
            runner._resume = False
        seed = place and place.seed
        if seed is not None and seed != runner._randomness_cfg.get('seed'):
            runner._randomness_cfg = {**runner._randomness_cfg, 'seed': seed}
            set_randomness = getattr(runner, 'set_randomness', None) or runner.strategy._set_randomness
            set_randomness(**runner._randomness_cfg)
            runner.logger.info(f'the seed of the interrupted run is used: {seed}')

    def _folder(self, runner: Runner) -> str:
        """Where MMEngine's ``before_train`` will save."""
        if self.out_dir is None or str(self.out_dir) == runner.work_dir:
            return runner.work_dir
        return f'{str(self.out_dir).rstrip("/")}/{Path(runner.work_dir).name}'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Drop text that MMEngine would execute, also where ``tools/`` did not install the loader; check the state."""
        drop_code(checkpoint, str(runner._load_from))
        place = place_of(checkpoint, '')
        self._loaded_id = None if place is None else place.run_id
        if not (runner._resume and isinstance(runner._train_loop, BaseLoop)):
            return
        if reason := NO_STATE if place is None else check_state(runner, checkpoint):
            raise CheckpointError(
                f'cannot resume from {runner._load_from!r}: {reason}; resume from another checkpoint, or start a new '
                'training from its weights: without --resume, with --cfg-options load_from=PATH'
            )

    def before_train(self, runner: Runner) -> None:
        """Choose the file backend; of what the resumed checkpoint says about files, keep those of this run."""
        folder = str(self.out_dir or runner.work_dir)
        if not (self.backend_args or self.file_client_args or '://' in folder):
            self.backend_args = dict(backend='vheat_atomic')
        if self._run is None:  # the runner has not called before_run
            self._run = Run(runner.work_dir, self._folder(runner), self.filename_tmpl)
        superfluous = self._believe_own_files(runner)
        super().before_train(runner)
        if not self.save_optimizer:
            runner.logger.warning('no checkpoint of this run can be resumed: checkpoint hook with save_optimizer=False')
        self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')
        self._finite = FiniteState(runner)
        if runner._resume:
            self._finite.require_resumed(str(runner._load_from))
        ignore_log_write_errors(runner)
        # The process may have been killed between writing a checkpoint and removing the one it replaced.
        for step in superfluous:
            self._remove_step(step)

    def _believe_own_files(self, runner: Runner) -> list[int]:
        """Reduce paths and numbers of checkpoints in the message hub to this run's; returns those to remove."""
        info, dropped = runner.message_hub.runtime_info, []
        own = self._loaded_id == self._run.record.id
        for key in [key for key in info if key.startswith(('best_ckpt', 'last_ckpt', 'best_score'))]:
            name = str(info[key]).rsplit('/', 1)[-1]
            if key.startswith('best_score'):
                believed = isinstance(info[key], int | float | np.number)
            elif believed := own and self._run.wrote(name):
                info[key] = self._run.join(name)
            if not believed and (value := info.pop(key)) is not None and not key.startswith('last_ckpt'):
                dropped.append(f'{key}={str(value)[:200]}')
        if dropped:
            runner.logger.info(f'not taken over from the checkpoint, not of this run: {", ".join(dropped)}')
        kept, superfluous = info.get('keep_ckpt_ids'), info.pop(SUPERFLUOUS, None)
        numbers = [step for step in kept if type(step) is int] if own and isinstance(kept, list) else []
        keep = numbers[-self.max_keep_ckpts :] if self.max_keep_ckpts > 0 else numbers
        if 'keep_ckpt_ids' in info:
            info['keep_ckpt_ids'] = list(keep)
        remove = [*numbers, *([superfluous] if own and type(superfluous) is int else [])]
        return [step for step in dict.fromkeys(remove) if step not in keep]

    def after_run(self, runner: Runner) -> None:
        """Note the end in ``run.json``, and release the work dir."""
        if self._run is not None and self._run.started:
            self._run.end(runner.iter)

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

    def save_interrupted(self, runner: Runner, finished_iterations: int, alone: bool = False) -> str | None:
        """Save the training state at any iteration; returns the path, or ``None`` if it could not be written.

        ``alone``: the other processes do not save now.
        """
        meta = dict(epoch=runner.epoch, iter=finished_iterations)
        return self._save(runner, INTERRUPTED, meta, alone)

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
        if step is not None:
            self._remove_own(self.filename_tmpl.format(step))

    def _remove_own(self, name: str) -> None:
        """Remove a checkpoint if this run wrote it; DeepSpeed's folders only if this process did."""
        if is_main_process() and (name in self._folders or self._run.wrote(name)):
            _remove(self.file_backend, self._run.join(name))

    def _save(self, runner: Runner, name: str, meta: dict, alone: bool = False) -> str | None:
        """Write a checkpoint, then ``last_checkpoint``; returns the path, or ``None`` if it could not be written."""
        assert self._finite is not None
        self._finite.require(self.last_ckpt, alone)
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
            if self.file_backend.isdir(path):
                self._folders.add(name)
            try:
                self._run.has_written()
                AtomicLocalBackend().put(os.fsencode(path), Path(runner.work_dir) / LAST)
            except OSError as error:  # find_newest does not need these files
                _log_failed_save(runner, f'{RUN_FILE} or {LAST}', error)
            if name != INTERRUPTED:  # the new checkpoint is newer than the interrupted state
                self._remove_own(INTERRUPTED)
        return path

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore the epoch and iteration of the checkpoint, which ``FlexibleRunner`` overwrites; add the run's id."""
        checkpoint['meta'].update(self._meta)
        if self._run is not None:
            checkpoint['meta'][RUN_ID] = self._run.record.id

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best or self._finite is None:  # a validation without a training saves nothing
            return
        self._finite.require(self.last_ckpt)
        names = {'best_ckpt_path', 'best_ckpt_path_dict'} & vars(self).keys()
        before, info = {name: copy(vars(self)[name]) for name in names}, dict(runner.message_hub.runtime_info)
        backend, self.file_backend = self.file_backend, _BestFiles(self.file_backend)
        deferred = self.file_backend
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:  # the earlier file still exists and remains the best
            self.__dict__.update(before)
            runner.message_hub.runtime_info.clear()
            runner.message_hub.runtime_info.update(info)
            _log_failed_save(runner, 'the best checkpoint', error)
            return
        finally:
            self.file_backend = backend
        best = getattr(self, 'best_ckpt_path_dict', None) or dict(best=self.best_ckpt_path)
        for path in set(deferred.paths) - set(best.values()):
            self._remove_own(path.rsplit('/', 1)[-1])


class _BestFiles:
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
