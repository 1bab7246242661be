"""What a data loader draws, as a function of where training stands; and samples that cannot be loaded."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from vheat_mm.utils.errors import BrokenSampleError

# What a random state is for; part of the seed, so that no two uses share numbers.
EPOCH, ITERATION, BATCH = range(3)
Fetch = Callable[[Sequence[int]], list]


def reseed(seed: int, purpose: int, position: int | Sequence[int], rank: int) -> None:
    """Seed all generators of this process by a well-mixed hash of the arguments."""
    place = (position,) if isinstance(position, int) else tuple(position)
    words = np.random.SeedSequence((seed, purpose, *place, rank)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 (what the libraries draw from)
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))  # all CUDA devices, too


class Batch(list):
    """Indices of a batch that know their place in training: (epoch, number within the epoch).

    In iteration-based loops, the pass over the data set that the loop set out with, and the number since.

    They travel with the indices to whichever worker loads them.
    """

    position: tuple[int, int] = (0, 0)


class PositionedBatches:
    """A batch sampler whose batches know their place, and which starts anywhere at the cost of drawing indices.

    Args:
        batches: The loader's own batch sampler.
        seed: The run's.
        rank: Of this process.
        endless: Go on with the next pass where the batch sampler ends, for iteration-based loops.

    Attributes:
        epoch: The pass over the data set that comes next.
        start: Batches of it that are left out. Applies once.
    """

    def __init__(self, batches: Iterable[Sequence[int]], seed: int, rank: int, endless: bool) -> None:
        self.batches = batches
        self.sampler = getattr(batches, 'sampler', None)  # MMEngine tells it the epoch
        self.epoch = 0
        self.start = 0
        self._seed, self._rank, self._endless = seed, rank, endless

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        epoch, draws, own = self.epoch, self._draw(self.epoch), _OwnRandomState()
        start, self.start = self.start, 0
        with own:
            deque(itertools.islice(draws, start), maxlen=0)
        for number in itertools.count(start):
            with own:
                drawn = next(draws, None)
            if drawn is None:
                return
            batch = Batch(drawn)
            batch.position = (epoch, number)
            yield batch

    def _draw(self, epoch: int) -> Iterator[Sequence[int]]:
        while True:
            reseed(self._seed, EPOCH, epoch, self._rank)
            batch = None
            for batch in self.batches:
                yield batch
            if not self._endless:
                return
            if batch is None:
                raise ValueError('the training set gives no batch: it is smaller than one, and drop_last drops it')
            epoch += 1
            if set_epoch := getattr(self.sampler, 'set_epoch', None):
                set_epoch(epoch)


class _OwnRandomState:
    """Random numbers of a sampler, whenever it is asked, apart from those of the process around it."""

    def __init__(self) -> None:
        self._state = _random_state()

    def __enter__(self) -> None:
        self._outside = _random_state()
        _set_random_state(self._state)

    def __exit__(self, *_: object) -> None:
        self._state = _random_state()
        _set_random_state(self._outside)


def _random_state() -> tuple:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])


class SeededFetch:
    """Loads a batch with random numbers that depend on nothing but the seed, the batch's place and the rank."""

    def __init__(self, fetch: Fetch, seed: int, rank: int) -> None:
        self._fetch, self._seed, self._rank = fetch, seed, rank

    def __call__(self, batch: Sequence[int]) -> list:
        """Load a batch; its indices come from :class:`PositionedBatches`."""
        if isinstance(batch, Batch):
            reseed(self._seed, BATCH, batch.position, self._rank)
        return self._fetch(batch)


class SkippingFetch:
    """Loads a batch; a sample that fails is named in the log, and one drawn at random takes its place.

    Args:
        dataset: Indexed by sample.
        check: Raises for a loaded sample that must not be used.
        tries: Failures in a row that are no accident any more.
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
            except Exception as caught:  # whatever a decoder or an augmentation raises on content it cannot take
                error = caught
            text = _one_line(error)
            # An error, so that processes other than the first write it, too.
            MMLogger.get_current_instance().error(
                f'sample {index} ({path_of(self._dataset, index)}) is left out, another takes its place: {text}'
            )
            if _may_pass(error) and attempt + 1 < self._tries:
                time.sleep(min(2**attempt, 30))
            index = int(np.random.randint(len(self._dataset)))  # noqa: NPY002 (seeded with the batch)
        raise BrokenSampleError(
            f'{self._tries} samples in a row could not be loaded, the last one with: {text}. '
            'python tools/misc/check_dataset.py CONFIG lists what is wrong with a data set'
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether it is the storage that failed, which another sample will not mend, but time may."""
    lasting = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR)
    return isinstance(error, OSError) and error.errno not in lasting


def path_of(dataset: Any, index: int) -> str:
    """Path of a sample's image as far as the data set tells it."""
    try:
        info = dataset.get_data_info(index)
        return str(info.get('img_path') or info.get('filename'))
    except Exception:  # data sets without such a list, or whose very list fails on this sample
        return 'path unknown'


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'[:500]


def train_loader(runner: Runner) -> DataLoader:
    """The training loader, with no worker started.

    An iteration-based loop of MMEngine starts its workers, and draws from its sampler, when it is built: before any
    hook can say how. Such a loop gets a loader like it, from the same config, and around the same data. Where there
    is no config, as the runner was given a loader, that one stays, with its workers.
    """
    loop = runner.train_loop
    old = getattr(loop, 'dataloader_iterator', None)
    if old is None or isinstance(old, Batches) or not isinstance(runner._train_dataloader, dict):
        return loop.dataloader
    dataset = loop.dataloader.dataset
    cfg = {**runner._train_dataloader, 'dataset': dataset}
    apart = runner._randomness_cfg.get('diff_rank_seed', False)
    dataset.__deepcopy__ = lambda memo: dataset  # MMEngine copies the config, and would copy what is in it
    try:
        loop.dataloader = runner.build_dataloader(cfg, seed=runner.seed, diff_rank_seed=apart)
    finally:
        del dataset.__deepcopy__
    loop.dataloader_iterator = Batches(loop.dataloader)
    return loop.dataloader


def set_fetch(loader: DataLoader, wrap: Callable[[Fetch], Fetch]) -> None:
    """Put ``wrap`` around how a loader's workers load a batch (PyTorch asks ``__getitems__`` where there is one)."""
    dataset = loader.dataset
    own = getattr(dataset, '__getitems__', None) or _EachItem(dataset)
    dataset.__getitems__ = wrap(own)  # type: ignore[attr-defined]


class _EachItem:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, batch: Sequence[int]) -> list:
        return [self._dataset[index] for index in batch]


class Batches:
    """MMEngine's endless iterator over a loader, made with the first batch asked for: only then do workers start."""

    def __init__(self, loader: DataLoader, left_out: int = 0) -> None:
        self._loader, self._left_out = loader, left_out
        self._iterator: Iterator | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        if self._left_out:  # MMEngine's loop asks for the batches before the place it resumes at, and drops them
            self._left_out -= 1
            return None
        if self._iterator is None:
            self._iterator = _InfiniteDataloaderIterator(self._loader)
        return next(self._iterator)


class WorkerInit:
    """Initialises a worker: it lives until the process that started it says otherwise.

    A cluster's SIGTERM goes to all processes of a job. Workers that end on it take the training with them before it
    can save its state.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker_id: int) -> None:
        """Called by PyTorch in the worker."""
        if self._init is not None:
            self._init(worker_id)
        if hasattr(signal, 'sigwaitinfo'):  # tells the sender; not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of threads to come, too
            threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid in (os.getpid(), os.getppid()):
            os._exit(0)
