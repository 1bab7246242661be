"""Random state as a function of (seed, epoch, iteration, rank), and resuming at any iteration."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from vheat_mm.engine.optimizers.accumulated_gradients import (
    average_gradients,
    has_accumulated_gradients,
    restore_gradients,
)
from vheat_mm.engine.runner.data_loading import lazy_iterator, set_fetch, train_loader
from vheat_mm.engine.runner.resumable_sampler import ITERATION, ResumableBatchSampler, SeededFetch, reseed

# Entries of a checkpoint's ``meta``, and of the checkpoint.
BATCHES_DONE, PROCESSES = 'vheat_batches_done', 'vheat_processes'
GRADIENTS = 'vheat_accumulated_gradients'


@HOOKS.register_module()
class ReproducibleHook(Hook):
    """Make an interrupted and resumed training equal to an uninterrupted one, at any iteration.

    MMEngine seeds once, at start-up, and restores no random state on resume: dropout, stochastic depth and
    augmentation continue with other numbers than in an uninterrupted run. With this hook they depend on (seed, epoch,
    iteration, rank) only, not on the number of data-loader workers or on other code that draws random numbers. Each
    epoch has its own order and augmentation.

    A checkpoint from within an epoch continues there, where MMEngine repeats the whole epoch. Iteration-based loops
    find their place by drawing indices, where MMEngine loads all earlier images again. Accumulated gradients are
    saved and restored, too.
    """

    priority = 'LOWEST'  # runs after all hooks that may draw random numbers

    def __init__(self) -> None:
        self._sampler: ResumableBatchSampler | None = None
        self._epoch = self._batch_idx = -1
        self._resumed_meta: dict[str, Any] = {}
        self._resumed_gradients: dict[str, Any] = {}
        self._accumulated: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep the position within the epoch."""
        if runner._resume:
            self._resumed_meta = checkpoint.get('meta', {})
            self._resumed_gradients = checkpoint.get(GRADIENTS, {})

    def before_train(self, runner: Runner) -> None:
        """Replace the loader's batch sampler."""
        loop, loader = runner.train_loop, train_loader(runner)
        if isinstance(loader.batch_sampler, ResumableBatchSampler):  # this hook is in the config twice
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        known = isinstance(loop.dataloader_iterator, Generator) if endless else isinstance(loop, EpochBasedTrainLoop)
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
                    sampler.seed = runner.seed
        self._sampler = ResumableBatchSampler(loader.batch_sampler, runner.seed, get_rank(), endless)
        # PyTorch refuses to set this attribute; a new loader would be unknown to other hooks.
        vars(loader)['batch_sampler'] = self._sampler
        set_fetch(loader, lambda fetch: SeededFetch(fetch, runner.seed, get_rank()))
        restore_gradients(runner.model, self._resumed_gradients)
        self._resumed_gradients = {}

    def before_train_epoch(self, runner: Runner) -> None:
        """Start at the checkpoint's position."""
        self._epoch, self._batch_idx = runner.epoch, -1
        loop = runner.train_loop
        if self._sampler is None:
            return
        if isinstance(loop, IterBasedTrainLoop):
            self._sampler.start = runner.iter
            loop.dataloader_iterator = lazy_iterator(loop.dataloader, skip=runner.iter)
            return
        start, self._resumed_meta = self._batches_done(runner), {}
        self._sampler.epoch, self._sampler.start = runner.epoch, start
        if start:
            runner.logger.info(f'epoch {runner.epoch + 1} continues after {start} of {len(loop.dataloader)} batches')
            run_iter = loop.run_iter
            # The loop counts from 0; logs and intervals need the number within the epoch.
            loop.run_iter = lambda idx, data_batch: run_iter(idx + start, data_batch)

    def _batches_done(self, runner: Runner) -> int:
        done = self._resumed_meta.get(BATCHES_DONE, 0)
        processes = self._resumed_meta.get(PROCESSES, get_world_size())
        if done and processes != get_world_size():
            done = done * processes // get_world_size()
            runner.logger.warning(
                f'the checkpoint is of {processes} processes, and there are {get_world_size()} now: the epoch '
                'continues at about the same part of the data set; the learning rate is not changed'
            )
        return done

    def after_train_epoch(self, runner: Runner) -> None:
        """Count the batches of the next epoch from 0."""
        vars(runner.train_loop).pop('run_iter', None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the forward pass."""
        self._batch_idx, self._accumulated = batch_idx, None
        reseed(runner.seed, ITERATION, runner.iter, get_rank())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Save the position within the epoch and accumulated gradients."""
        meta = checkpoint['meta']
        within = meta['epoch'] == self._epoch and isinstance(runner.train_loop, EpochBasedTrainLoop)
        meta[BATCHES_DONE] = self._batch_idx + 1 if within else 0
        meta[PROCESSES] = get_world_size()
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
