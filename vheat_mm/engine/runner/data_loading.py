"""Changes to a Runner's data loaders: broken samples are skipped, workers start late and ignore signals to the job."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from vheat_mm.engine.runner.resumable_sampler import Fetch
from vheat_mm.utils.errors import BrokenSampleError


class SkippingFetch:
    """Loads a batch; a sample that fails is logged and replaced by another one, drawn at random.

    Args:
        dataset: Indexed by sample.
        check: Raises for a loaded sample that must not be used.
        tries: Number of failures in a row that raise an error.
    """

    def __init__(self, dataset: Any, check: Callable[[Any], None], tries: int) -> None:
        self._dataset, self._check, self._tries = dataset, check, tries

    def __call__(self, batch: Sequence[int]) -> list:
        """Load a batch.

        Raises:
            BrokenSampleError: ``tries`` samples in a row have failed.
        """
        return [self._load(index) for index in batch]

    def _load(self, index: int) -> Any:
        for attempt in range(self._tries):
            try:
                sample = self._dataset[index]
                self._check(sample)
                return sample
            except Exception as caught:  # decoders and augmentations raise errors of many types
                error = caught
            text = f'{type(error).__name__}: {" ".join(str(error).split())}'[:500]
            # The level ERROR is written by all ranks, lower ones by rank 0 only.
            MMLogger.get_current_instance().error(
                f'sample {index} ({path_of(self._dataset, index)}) is left out, another takes its place: {text}'
            )
            if _is_storage_error(error) and attempt + 1 < self._tries:
                time.sleep(min(2**attempt, 30))
            index = int(np.random.randint(len(self._dataset)))  # noqa: NPY002 (seeded with the batch)
        raise BrokenSampleError(
            f'{self._tries} samples in a row could not be loaded, the last one with: {text}. '
            'python tools/misc/check_dataset.py CONFIG lists what is wrong with a data set'
        ) from error


def _is_storage_error(error: BaseException) -> bool:
    """Whether the storage failed, not this file: then waiting helps, and another sample does not."""
    of_file = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
    return isinstance(error, OSError) and error.errno not in of_file


def path_of(dataset: Any, index: int) -> str:
    """Path of a sample's image, if the data set has it."""
    try:
        info = dataset.get_data_info(index)
        return str(info.get('img_path') or info.get('filename'))
    except Exception:  # no such method, or it fails for this sample
        return 'path unknown'


def train_loader(runner: Runner) -> DataLoader:
    """The training loader, with no worker started.

    MMEngine's iteration-based loop starts its workers and draws from its sampler when it is built, before hooks can
    change them. It gets a new loader from the same config and data set here. A loader that was given to the runner
    as an object is kept, with its workers.
    """
    loop = runner.train_loop
    old = getattr(loop, 'dataloader_iterator', None)
    if old is None or isinstance(old, Generator) or not isinstance(runner._train_dataloader, dict):
        return loop.dataloader
    dataset = loop.dataloader.dataset
    cfg = {**runner._train_dataloader, 'dataset': dataset}
    diff_rank_seed = runner._randomness_cfg.get('diff_rank_seed', False)
    dataset.__deepcopy__ = lambda memo: dataset  # MMEngine copies the config with all that it holds
    try:
        loop.dataloader = runner.build_dataloader(cfg, seed=runner.seed, diff_rank_seed=diff_rank_seed)
    finally:
        del dataset.__deepcopy__
    loop.dataloader_iterator = lazy_iterator(loop.dataloader)
    return loop.dataloader


def set_fetch(loader: DataLoader, wrap: Callable[[Fetch], Fetch]) -> None:
    """Wrap the function with which a loader's workers load a batch: PyTorch uses ``__getitems__`` if there is one."""
    dataset = loader.dataset
    own = getattr(dataset, '__getitems__', None) or functools.partial(_fetch_each, dataset)
    dataset.__getitems__ = wrap(own)  # type: ignore[attr-defined]


def _fetch_each(dataset: Any, batch: Sequence[int]) -> list:
    return [dataset[index] for index in batch]


def lazy_iterator(loader: DataLoader, skip: int = 0) -> Generator:
    """MMEngine's endless iterator over a loader, built when the first batch is needed: only then workers start.

    Args:
        loader: The training loader.
        skip: How often ``None`` is returned first. When MMEngine's loop resumes, it asks for the batches before its
            place and drops them.
    """
    yield from itertools.repeat(None, skip)
    yield from _InfiniteDataloaderIterator(loader)


class WorkerInit:
    """Initialises a worker that ends on SIGTERM only if its parent process sends it.

    A cluster sends SIGTERM to all processes of a job. Workers that end on it take the training with them before it
    can save its state.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker_id: int) -> None:
        """Called by PyTorch in the worker."""
        if self._init is not None:
            self._init(worker_id)
        if hasattr(signal, 'sigwaitinfo'):  # tells the sender; not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit it
            threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (os.getpid(), os.getppid()):
            os._exit(0)
