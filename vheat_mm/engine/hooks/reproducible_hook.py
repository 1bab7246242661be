"""Random state as a function of (seed, epoch, iteration, rank), and resuming at any iteration."""

from __future__ import annotations

from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from vheat_mm.engine.hooks.accumulation import are_waiting, collect, restore
from vheat_mm.engine.runner.data_loading import (
    ITERATION,
    Batches,
    PositionedBatches,
    SeededFetch,
    reseed,
    set_fetch,
    train_loader,
)

# Entries of a checkpoint's ``meta``.
BATCHES_DONE, PROCESSES = 'vheat_batches_done', 'vheat_processes'
GRADIENTS = 'vheat_accumulated_gradients'  # of a checkpoint


@HOOKS.register_module()
class ReproducibleHook(Hook):
    """An interrupted and resumed training equals the uninterrupted one, wherever it was interrupted.

    MMEngine seeds once, at start-up, and restores no random state on resume: dropout, stochastic depth and
    augmentation then continue with other numbers than those of an uninterrupted run. With this hook they depend on
    nothing but (seed, epoch, iteration, rank): not on the number of data-loader workers, nor on what else draws
    numbers. Each epoch has its own order and augmentation.

    Checkpoints made within an epoch continue there: MMEngine would train the whole epoch again. Iteration-based loops
    find their place by drawing indices, where MMEngine loads all earlier images once more. Gradients accumulated so
    far are saved, too.
    """

    priority = 'LOWEST'  # random numbers that other hooks draw must not move ours

    def __init__(self) -> None:
        self._batches: PositionedBatches | None = None
        self._epoch = self._batch_idx = -1
        self._resumed: dict[str, Any] = {}
        self._gradients: dict[str, Any] = {}
        self._waiting: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what tells the place within an epoch."""
        if runner._resume:
            self._resumed = checkpoint.get('meta', {})
            self._gradients = checkpoint.get(GRADIENTS, {})

    def before_train(self, runner: Runner) -> None:
        """Put the places of batches into the loader."""
        loop, loader = runner.train_loop, train_loader(runner)
        if isinstance(loader.batch_sampler, PositionedBatches):  # of the same hook, configured twice
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        known = isinstance(loop.dataloader_iterator, Batches) if endless else isinstance(loop, EpochBasedTrainLoop)
        if not known or loader.batch_sampler is None:
            runner.logger.warning(
                f'{type(loop).__name__} with {type(loader).__name__}: what is drawn after resuming differs from an '
                'uninterrupted run; ReproducibleHook knows epoch- and iteration-based loops over batches, whose '
                'train_dataloader is a config'
            )
            return
        if not runner._randomness_cfg.get('diff_rank_seed', False):
            samplers: list[Any] = [loader.sampler, getattr(loader.batch_sampler, 'sampler', None)]
            for sampler in samplers:
                if isinstance(getattr(sampler, 'seed', None), int):  # drawn at this start, before the checkpoint's
                    sampler.seed = runner.seed
        self._batches = PositionedBatches(loader.batch_sampler, runner.seed, get_rank(), endless)
        # PyTorch refuses to set it. A new loader would be an object that other hooks have not seen.
        vars(loader)['batch_sampler'] = self._batches
        set_fetch(loader, lambda fetch: SeededFetch(fetch, runner.seed, get_rank()))
        restore(runner, self._gradients)
        self._gradients = {}

    def before_train_epoch(self, runner: Runner) -> None:
        """Set out from where the checkpoint was made."""
        self._epoch, self._batch_idx = runner.epoch, -1
        loop = runner.train_loop
        if self._batches is None:
            return
        if isinstance(loop, IterBasedTrainLoop):
            self._batches.start = runner.iter
            loop.dataloader_iterator = Batches(loop.dataloader, left_out=runner.iter)
            return
        start, self._resumed = self._batches_done(runner), {}
        self._batches.epoch, self._batches.start = runner.epoch, start
        if start:
            runner.logger.info(f'epoch {runner.epoch + 1} goes on after {start} of its {len(loop.dataloader)} batches')
            self._count_from(loop, start)

    def _batches_done(self, runner: Runner) -> int:
        done = self._resumed.get(BATCHES_DONE, 0)
        processes = self._resumed.get(PROCESSES, get_world_size())
        if done and processes != get_world_size():
            done = done * processes // get_world_size()
            runner.logger.warning(
                f'{processes} processes made the checkpoint and {get_world_size()} go on with it: the epoch '
                'continues at about the same share of the data set, and the rate is for the batch size it was'
            )
        return done

    @staticmethod
    def _count_from(loop: EpochBasedTrainLoop, start: int) -> None:
        """Have the loop number the batches of its first epoch from ``start``, as logs and intervals count them."""
        run_iter = loop.run_iter

        def shifted(idx: int, data_batch: Any) -> None:
            run_iter(idx + start, data_batch)

        loop.run_iter = shifted

    def after_train_epoch(self, runner: Runner) -> None:
        """Number the next epoch's batches from 0."""
        vars(runner.train_loop).pop('run_iter', None)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Fix what the model's forward pass draws."""
        self._batch_idx, self._waiting = batch_idx, None
        reseed(runner.seed, ITERATION, runner.iter, get_rank())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the place within the epoch, and gradients that wait for the next step of the optimizer."""
        meta = checkpoint['meta']
        within = meta['epoch'] == self._epoch and isinstance(runner.train_loop, EpochBasedTrainLoop)
        meta[BATCHES_DONE] = self._batch_idx + 1 if within else 0
        meta[PROCESSES] = get_world_size()
        if 'optimizer' in checkpoint and are_waiting(runner.optim_wrapper):
            if self._waiting is None and get_world_size() == 1:
                self._waiting = collect(runner)
            if self._waiting is None:
                runner.logger.warning(
                    'the gradients accumulated so far are not in this checkpoint: it needs AtomicCheckpointHook, and '
                    'a model that is not sharded'
                )
            else:
                checkpoint[GRADIENTS] = self._waiting

    def before_collective_save(self, runner: Runner) -> None:
        """Gather what only all processes together can; :class:`AtomicCheckpointHook` calls this before it saves."""
        if self._waiting is None and are_waiting(runner.optim_wrapper) and isinstance(runner, Runner):
            self._waiting = collect(runner)

    def before_val(self, runner: Runner) -> None:
        """Gather already now for a save during validation, which the first process makes alone."""
        self.before_collective_save(runner)
