"""Random state as a function of (seed, epoch, iteration, rank), and resuming at any iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from vheat_mm.checkpoint.plain import to_plain
from vheat_mm.checkpoint.run_folder import read_record
from vheat_mm.engine.optimizers.accumulated_gradients import (
    average_gradients,
    has_accumulated_gradients,
    restore_gradients,
)
from vheat_mm.engine.runner.data_loading import LazyIterator, set_fetch, train_loader
from vheat_mm.engine.runner.resumable_sampler import ITERATION, ResumableBatchSampler, SeededFetch, reseed
from vheat_mm.engine.runner.run_settings import batches_done, compare_settings, run_settings
from vheat_mm.engine.runner.stateful_parts import note_stateful_parts
from vheat_mm.utils.dist import any_rank
from vheat_mm.utils.errors import CheckpointError

# Entries of a checkpoint's ``meta``; the last one is of the checkpoint.
BATCHES_DONE, SETTINGS, VALIDATED = 'vheat_batches_done', 'vheat_settings', 'vheat_validated'
EARLY, GRADIENTS = 'vheat_early_stopping', 'vheat_accumulated_gradients'


@HOOKS.register_module()
class ReproducibleHook(Hook):
    """Make an interrupted and resumed training equal to an uninterrupted one, at any iteration.

    MMEngine seeds once, at start-up, and restores no random state on resume: dropout, stochastic depth and
    augmentation continue with other numbers than in an uninterrupted run. With this hook they depend on (seed, epoch,
    iteration, rank) only, not on the number of data-loader workers or on other code that draws random numbers. Each
    epoch has its own order and augmentation.

    A checkpoint from within an epoch continues there, where MMEngine repeats the whole epoch. Iteration-based loops
    find their place by drawing indices, where MMEngine loads all earlier images again. Accumulated gradients are
    saved and restored, too, and the state of ``EarlyStoppingHook``. A checkpoint is written before the validation that
    follows; if it is the last one, the validation is run after resuming.

    What differs between the run and its continuation is logged, one line each, with what follows from it. One line
    names transforms, samplers and hooks with a state of their own, which no checkpoint holds.

    Raises:
        CheckpointError: The training state does not fit: another kind of loop, optimizer, schedulers or parameters.
    """

    priority = 'LOWEST'  # runs after all hooks that may draw random numbers

    def __init__(self) -> None:
        self._sampler: ResumableBatchSampler | None = None
        self._epoch = self._batch_idx = -1
        self._start = 0  # batches that were done before
        self._ahead = 0  # batches drawn minus iterations, in iteration-based loops
        self._seed = 0
        self._validated = 0  # iteration of the last complete validation
        self._settings: dict[str, Any] = {}
        self._resumed_meta: dict[str, Any] = {}
        self._resumed_gradients: dict[str, Any] = {}
        self._accumulated: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the position, and compare the settings of the run; its state is loaded after this."""
        if runner._resume:
            self._resumed_meta = meta = checkpoint.get('meta', {})
            self._resumed_gradients = checkpoint.get(GRADIENTS, {})
            self._settings = new = run_settings(runner)
            path = str(runner._load_from)
            old = meta.get(SETTINGS, new)  # an earlier version stored none
            own = getattr(runner.train_loop.dataloader.dataset, 'metainfo', None)
            if repr(to_plain(own)) == repr(meta.get('dataset_meta')):
                meta['dataset_meta'] = own  # MMEngine warns if it is of other types
            try:
                for line in compare_settings(old, new, meta, path):
                    runner.logger.warning(f'changed since the checkpoint: {line}')
                if old.get('save_best', new['save_best']) != new['save_best']:
                    info = checkpoint['message_hub']['runtime_info']
                    for key in [key for key in info if key.startswith(('best_score', 'best_ckpt'))]:
                        del info[key]
                self._start = batches_done(meta.get(BATCHES_DONE, 0), old, new)
                _restore_early_stopping(runner, meta.get(EARLY))
            except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
                raise CheckpointError(
                    f'cannot resume from {path!r}: its position or settings are not those of a training ({error!r}); '
                    'resume from another checkpoint'
                ) from error

    def before_train(self, runner: Runner) -> None:
        """Replace the loader's batch sampler, and continue where the checkpoint was written."""
        self._settings = self._settings or run_settings(runner)
        self._seed = self._resumed_meta.get('seed', runner.seed)  # FlexibleRunner does not restore it
        if note := note_stateful_parts(runner):
            runner.logger.warning(note)
        self._replace_sampler(runner)
        self._validated = self._resumed_meta.get(VALIDATED, runner.iter)
        lost = self._sampler is not None and self._validated != runner.iter
        if lost and _misses_validation(runner, self._resumed_meta.get(BATCHES_DONE, 0)):
            runner.logger.info('the checkpoint was written before a validation: it is run now')
            runner.val_loop.run()

    def _replace_sampler(self, runner: Runner) -> None:
        loop, loader = runner.train_loop, train_loader(runner)
        if isinstance(loader.batch_sampler, ResumableBatchSampler):  # this hook is in the config twice
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        if endless and SETTINGS in self._resumed_meta:
            self._ahead = self._start - runner.iter
        known = isinstance(loop.dataloader_iterator, LazyIterator) if endless else isinstance(loop, EpochBasedTrainLoop)
        if not known or loader.batch_sampler is None:
            runner.logger.warning(
                f'{type(loop).__name__} with {type(loader).__name__}: after resuming, other samples are drawn than in '
                'an uninterrupted run; ReproducibleHook supports epoch- and iteration-based loops over batches with '
                'train_dataloader given as a config'
            )
            return
        if not runner._randomness_cfg.get('diff_rank_seed', False):
            samplers: list[Any] = [loader.sampler, getattr(loader.batch_sampler, 'sampler', None)]
            for sampler in samplers:
                if isinstance(getattr(sampler, 'seed', None), int):  # set before the checkpoint's seed was known
                    sampler.seed = self._seed
        self._sampler = ResumableBatchSampler(loader.batch_sampler, self._seed, get_rank(), endless)
        # PyTorch refuses to set this attribute; a new loader would be unknown to other hooks.
        vars(loader)['batch_sampler'] = self._sampler
        set_fetch(loader, lambda fetch: SeededFetch(fetch, self._seed, get_rank()))
        restore_gradients(runner.model, self._resumed_gradients)
        self._resumed_gradients = {}

    def before_train_epoch(self, runner: Runner) -> None:
        """Start at the checkpoint's position."""
        self._epoch, self._batch_idx = runner.epoch, -1
        loop = runner.train_loop
        if self._sampler is None:
            return
        if isinstance(loop, IterBasedTrainLoop):
            self._sampler.start = runner.iter + self._ahead
            skips = hasattr(loop, 'fast_forward_on_resume')  # onedl-mmengine does not ask for batches to drop
            loop.dataloader_iterator = LazyIterator(loop.dataloader, skip=0 if skips else runner.iter)
            return
        start, self._start = self._start, 0
        self._sampler.epoch, self._sampler.start = runner.epoch, start
        if start:
            runner.logger.info(f'epoch {runner.epoch + 1} continues after {start} of {len(loop.dataloader)} batches')
            run_iter = loop.run_iter
            # The loop counts from 0; logs and intervals need the number within the epoch.
            loop.run_iter = lambda idx, data_batch: run_iter(idx + start, data_batch)

    def after_train_epoch(self, runner: Runner) -> None:
        """Count the batches of the next epoch from 0."""
        vars(runner.train_loop).pop('run_iter', None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the forward pass."""
        self._batch_idx, self._accumulated = batch_idx, None
        reseed(self._seed, ITERATION, runner.iter, get_rank())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the position within the epoch and accumulated gradients."""
        meta = checkpoint['meta']
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            meta[BATCHES_DONE] = meta['iter'] + self._ahead
        else:
            meta[BATCHES_DONE] = self._batch_idx + 1 if meta['epoch'] == self._epoch else 0
        meta[SETTINGS], meta[VALIDATED], meta[EARLY] = self._settings, self._validated, _early_stopping(runner)
        if 'optimizer' in checkpoint and has_accumulated_gradients(runner.optim_wrapper):
            if self._accumulated is None and get_world_size() == 1:
                self._accumulated = average_gradients(runner.model)
            if self._accumulated is None:
                runner.logger.warning(
                    'accumulated gradients are not in this checkpoint: that needs AtomicCheckpointHook, and a model '
                    'that is not sharded'
                )
            else:
                checkpoint[GRADIENTS] = self._accumulated

    def before_collective_save(self, runner: Runner) -> None:
        """Average gradients over all processes; :class:`AtomicCheckpointHook` calls this before it saves."""
        if self._accumulated is None and has_accumulated_gradients(runner.optim_wrapper) and isinstance(runner, Runner):
            self._accumulated = average_gradients(runner.model)

    def before_val(self, runner: Runner) -> None:
        """Average gradients in case rank 0 saves alone during this validation."""
        self.before_collective_save(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Note that the validation is complete."""
        self._validated = runner.iter


def _misses_validation(runner: Runner, batches: int) -> bool:
    """Whether the loop validates at this place, after ``batches`` of the epoch, unless it has ended with that."""
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    loop._decide_current_val_interval()
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    if (by_epoch and batches) or done < loop.val_begin or (done % loop.val_interval and done != last):
        return False
    record, _ = read_record(Path(runner.work_dir))
    return not any_rank(done >= last and record is not None and record.ended == runner.iter)


def _early_stopping(runner: Runner) -> dict[str, Any]:
    hooks = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    return dict(
        stopped=runner.train_loop.stop_training,
        counts=[[hook.wait_count, hook.best_score] for hook in hooks],
        settings=[[hook.monitor, hook.patience, hook.stopping_threshold] for hook in hooks],
    )


def _restore_early_stopping(runner: Runner, saved: dict[str, Any] | None) -> None:
    own = _early_stopping(runner)
    if not saved or len(saved['counts']) != len(own['counts']):
        return
    hooks = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    for hook, counts in zip(hooks, saved['counts'], strict=True):
        hook.wait_count, hook.best_score = int(counts[0]), float(counts[1])
    if saved['stopped'] and saved['settings'] == own['settings']:
        runner.train_loop.stop_training = True
        runner.logger.warning(
            'this training was ended early, and no iteration is left to train: raise the patience of EarlyStoppingHook '
            'to train on, or start a new training from these weights with load_from'
        )
