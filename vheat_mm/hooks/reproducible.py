"""Random state as a function of (seed, epoch, iteration, rank), so that resuming changes nothing."""

from __future__ import annotations

import functools
import logging
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dataset import worker_init_fn as mmengine_worker_init_fn
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

# What a random state is for; part of the seed, so that no two uses share numbers.
EPOCH, ITERATION, BATCH = range(3)


@HOOKS.register_module()
class ReproducibleHook(Hook):
    """Reseed Python, numpy and PyTorch before every epoch and iteration from where training stands.

    MMEngine seeds once, at start-up, and restores no random state on resume: dropout, stochastic depth and
    augmentation then continue with other numbers than those of an uninterrupted run. With this hook they depend on
    nothing but (seed, epoch, iteration, rank). In particular, each epoch has its own shuffling and augmentation.

    Data-loader workers take their seed from the main process whenever they start, so epoch-based training needs
    ``persistent_workers=False`` in its ``train_dataloader`` (``tools/train.py`` sets that).
    """

    priority = 'LOWEST'  # random numbers that other hooks draw must not move ours

    def before_train(self, runner: Runner) -> None:
        """Let data-loader workers be seeded by where training stands."""
        loader = runner.train_dataloader
        init_fn = loader.worker_init_fn
        # MMEngine's gives a worker the same seed at each start: every epoch would be augmented alike.
        if isinstance(init_fn, functools.partial) and init_fn.func is mmengine_worker_init_fn:
            quiet = init_fn.keywords.get('disable_subprocess_warning', False)
            loader.worker_init_fn = functools.partial(seed_worker, quiet=quiet)
        if loader.persistent_workers and not isinstance(runner.train_loop, IterBasedTrainLoop):
            runner.logger.log(
                logging.WARNING,
                'a resumed run will be augmented otherwise than an uninterrupted one: '
                'set train_dataloader.persistent_workers=False',
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Fix what the epoch's data loading starts from; iteration-based loops count batches instead."""
        reseed(runner.seed, EPOCH, runner.epoch)
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            # On resume the loop draws and drops all earlier batches, without calling any hook.
            loop.dataloader_iterator = SeededIterator(loop.dataloader_iterator, runner.seed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | tuple | list | None = None) -> None:
        """Fix what the model's forward pass draws."""
        reseed(runner.seed, ITERATION, runner.iter)


class SeededIterator:
    """Iterator that fixes the random state before each item by the item's position."""

    def __init__(self, iterator: Iterator, seed: int) -> None:
        self._iterator = iterator
        self._seed = seed
        self._position = 0

    def __iter__(self) -> SeededIterator:
        return self

    def __next__(self) -> Any:
        reseed(self._seed, BATCH, self._position)
        self._position += 1
        return next(self._iterator)


def reseed(seed: int, purpose: int, position: int) -> None:
    """Seed all generators of this process by a well-mixed hash of the arguments and the rank."""
    words = np.random.SeedSequence((seed, purpose, position, get_rank())).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 (what the libraries draw from)
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))  # all CUDA devices, too


def seed_worker(worker_id: int, quiet: bool = False) -> None:
    """Seed a data-loader worker by what PyTorch drew for it from the main process's state.

    Args:
        worker_id: Given by PyTorch, whose seed for the worker contains it already.
        quiet: Silence the warnings of all workers but the first.
    """
    words = np.random.SeedSequence(torch.initial_seed()).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 (what the libraries draw from)
    if quiet and worker_id != 0:
        warnings.simplefilter('ignore')
