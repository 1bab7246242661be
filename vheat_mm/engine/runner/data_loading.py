"""Changes to a Runner's data loaders: broken samples are skipped, workers start late and ignore signals to the job."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from vheat_mm.engine.runner.resumable_sampler import Fetch
from vheat_mm.utils.errors import AnnotationError, BrokenSampleError
from vheat_mm.utils.process import end_with_parent


class Ledger:
    """Which samples of a data set were loaded and which were left out, counted in all workers of a process.

    Args:
        length: Number of samples.
        max_share: Share of samples left out that raises an error.
    """

    _REASONS = ('could not be read', 'do not fit the model', 'could not be decoded or transformed')
    _ENOUGH, _ALWAYS = 100, 3  # samples of which a share says something; left out whatever the share

    def __init__(self, length: int, max_share: float) -> None:
        # 0: not seen, 1: loaded, from 2 on: left out for that reason. Workers write into the same memory.
        self.marks = torch.zeros(length, dtype=torch.uint8).share_memory_()
        self._max_share = max_share

    def add(self, index: int, error: Exception | None) -> None:
        """Note that a sample was loaded or left out."""
        reason = 0 if isinstance(error, OSError) else 1 if isinstance(error, AnnotationError) else 2
        mark = 1 if error is None else 2 + reason
        self.marks[index] = max(int(self.marks[index]), mark)

    def summary(self) -> str:
        """How many samples were left out and why; an empty text for none."""
        counts = torch.bincount(self.marks, minlength=5).tolist()[2:]
        reasons = [f'{count} {reason}' for count, reason in zip(counts, self._REASONS, strict=True) if count]
        if not reasons:
            return ''
        return f'{sum(counts)} of {int(self.marks.count_nonzero())} samples were left out: {", ".join(reasons)}'

    def is_full(self) -> bool:
        """Whether too many were left out: of those seen or, before these are 100, of the whole data set."""
        seen = int(self.marks.count_nonzero())
        allowed = self._max_share * (seen if seen >= self._ENOUGH else len(self.marks))
        return int((self.marks > 1).sum()) > max(allowed, self._ALWAYS)


class NamingFetch:
    """Loads a batch of a validation or test set, and names the sample that fails: a score needs each of them.

    Args:
        dataset: Indexed by sample.
        check: Raises for a loaded sample that must not be used.
    """

    def __init__(self, dataset: Any, check: Callable[[Any], None]) -> None:
        self._dataset, self._check = dataset, check

    def __call__(self, batch: Sequence[int]) -> list:
        """Load a batch.

        Raises:
            BrokenSampleError: A sample has failed; in training: ``tries`` in a row, or too many of all.
        """
        return [self._load(index) for index in batch]

    def _load(self, index: int) -> Any:
        try:
            return self._use(index)
        except Exception as error:
            raise BrokenSampleError(
                f'sample {index} ({path_of(self._dataset, index)}) of the data set to test on cannot be used: '
                f'{_one_line(error)}. Correct or remove it: a score needs each sample'
            ) from error

    def _use(self, index: int) -> Any:
        sample = self._dataset[index]
        self._check(sample)
        return sample


class SkippingFetch(NamingFetch):
    """Loads a batch for training; a sample that fails is logged and replaced by another one, drawn at random.

    Args:
        dataset: Indexed by sample.
        check: Raises for a loaded sample that must not be used.
        tries: Number of failures in a row that raise an error.
        ledger: Of the data set.
    """

    def __init__(self, dataset: Any, check: Callable[[Any], None], tries: int, ledger: Ledger) -> None:
        super().__init__(dataset, check)
        self._tries, self._ledger, self._first = tries, ledger, ''

    def _load(self, index: int) -> Any:
        for attempt in range(self._tries):
            try:
                sample = self._use(index)
                self._ledger.add(index, None)
                return sample
            except Exception as caught:  # decoders and augmentations raise errors of many types
                error = caught
            self._ledger.add(index, error)
            text = f'sample {index} ({path_of(self._dataset, index)})'
            reason = _one_line(error)
            self._first = self._first or f'{text}: {reason}'
            if self._ledger.is_full():
                raise BrokenSampleError(f'{self._ledger.summary()}. The first was {self._first}. {_ADVICE}') from error
            # The level ERROR is written by all ranks, lower ones by rank 0 only.
            MMLogger.get_current_instance().error(f'{text} is left out, another takes its place: {reason}')
            if _is_storage_error(error) and attempt + 1 < self._tries:
                time.sleep(min(2**attempt, 30))
            index = int(np.random.randint(len(self._dataset)))  # noqa: NPY002 (seeded with the batch)
        raise BrokenSampleError(
            f'{self._tries} samples in a row could not be loaded, the last one with: {reason}. {_ADVICE}'
        ) from error


_ADVICE = 'python tools/misc/check_dataset.py CONFIG lists what is wrong with a data set'


def _one_line(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())}'[:500]


def _is_storage_error(error: BaseException) -> bool:
    """Whether the storage failed, not this file: then waiting helps, and another sample does not."""
    of_file = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
    of_file |= {errno.EINVAL, errno.ENXIO, errno.EFBIG}  # a pipe or a device, a socket, a file that is too large
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
    if old is None or isinstance(old, LazyIterator) or not isinstance(runner._train_dataloader, dict):
        return loop.dataloader
    dataset = loop.dataloader.dataset
    cfg = {**runner._train_dataloader, 'dataset': dataset}
    diff_rank_seed = runner._randomness_cfg.get('diff_rank_seed', False)
    dataset.__deepcopy__ = lambda memo: dataset  # MMEngine copies the config with all that it holds
    try:
        loop.dataloader = runner.build_dataloader(cfg, seed=runner.seed, diff_rank_seed=diff_rank_seed)
    finally:
        del dataset.__deepcopy__
    loop.dataloader_iterator = LazyIterator(loop.dataloader)
    return loop.dataloader


def set_fetch(loader: DataLoader, wrap: Callable[[Fetch], Fetch]) -> None:
    """Wrap the function with which a loader's workers load a batch: PyTorch uses ``__getitems__`` if there is one."""
    dataset = loader.dataset
    own = getattr(dataset, '__getitems__', None) or functools.partial(_fetch_each, dataset)
    dataset.__getitems__ = wrap(own)  # type: ignore[attr-defined]


def _fetch_each(dataset: Any, batch: Sequence[int]) -> list:
    return [dataset[index] for index in batch]


class LazyIterator:
    """MMEngine's endless iterator over a loader, built when the first batch is needed: only then workers start.

    Args:
        loader: The training loader.
        skip: How often ``None`` is returned first. When MMEngine's loop resumes, it asks for the batches before its
            place and drops them; onedl-mmengine's calls :meth:`skip_iter`.
    """

    def __init__(self, loader: DataLoader, skip: int = 0) -> None:
        self._batches = itertools.chain(itertools.repeat(None, skip), _batches(loader))

    def __iter__(self) -> LazyIterator:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def skip_iter(self, count: int) -> None:
        """Nothing: the sampler begins behind the first ``count`` batches."""


def _batches(loader: DataLoader) -> Iterator[Any]:
    yield from _InfiniteDataloaderIterator(loader)


class WorkerInit:
    """Initialises a worker that ends on SIGTERM only if its parent process sends it.

    A cluster sends SIGTERM to all processes of a job. Workers that end on it take the training with them before it
    can save its state. A worker whose parent was killed is killed, too.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init, self._parent = init, os.getpid()

    def __call__(self, worker_id: int) -> None:
        """Called by PyTorch in the worker."""
        end_with_parent(signal.SIGKILL, self._parent)
        if self._init is not None:
            self._init(worker_id)
        if hasattr(signal, 'sigwaitinfo'):  # tells the sender; not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit it
            threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (os.getpid(), os.getppid()):
            os._exit(0)
