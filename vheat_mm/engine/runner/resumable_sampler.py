"""Resumable data loading: the random numbers of a batch depend on (seed, epoch, batch, rank) and nothing else."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

# The purpose of a random state; part of the seed, so that no two purposes draw the same numbers.
EPOCH, ITERATION, BATCH = range(3)
Fetch = Callable[[Sequence[int]], list]


def reseed(seed: int, purpose: int, position: int | Sequence[int], rank: int) -> None:
    """Seed all generators of this process with a hash of the arguments."""
    position = (position,) if isinstance(position, int) else tuple(position)
    words = np.random.SeedSequence((seed, purpose, *position, rank)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 (what the libraries draw from)
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))  # all CUDA devices, too


class BatchIndices(list):
    """Indices of a batch with its ``position`` in training: (epoch, number within the epoch).

    In iteration-based loops: (epoch in which the loop started, number since then). The position goes with the indices
    to the worker that loads them.
    """

    position: tuple[int, int] = (0, 0)


class ResumableBatchSampler:
    """A batch sampler that can start at any batch: it draws the indices before it, but loads no samples.

    Args:
        batches: The loader's own batch sampler.
        seed: The run's.
        rank: Of this process.
        endless: Continue with the next epoch where the batch sampler ends, for iteration-based loops.

    Attributes:
        epoch: The next epoch.
        start: Number of its batches to skip. Applies once.
    """

    def __init__(self, batches: Iterable[Sequence[int]], seed: int, rank: int, endless: bool) -> None:
        self.batches = batches
        self.sampler = getattr(batches, 'sampler', None)  # MMEngine calls its set_epoch
        self.epoch = 0
        self.start = 0
        self._seed, self._rank, self._endless = seed, rank, endless

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, draws, own = self.epoch, self._draw(self.epoch), _SeparateRandomState()
        start, self.start = self.start, 0
        with own:
            deque(itertools.islice(draws, start), maxlen=0)
        for number in itertools.count(start):
            with own:
                drawn = next(draws, None)
            if drawn is None:
                return
            batch = BatchIndices(drawn)
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
                raise ValueError(
                    'the training set gives no batch: it has fewer samples than batch_size, and drop_last=True'
                )
            epoch += 1
            if set_epoch := getattr(self.sampler, 'set_epoch', None):
                set_epoch(epoch)


class _SeparateRandomState:
    """Random numbers of a sampler, independent of when the process asks it for the next batch."""

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
    """Loads a batch after seeding with its position; indices come from :class:`ResumableBatchSampler`."""

    def __init__(self, fetch: Fetch, seed: int, rank: int) -> None:
        self._fetch, self._seed, self._rank = fetch, seed, rank

    def __call__(self, batch: Sequence[int]) -> list:
        if isinstance(batch, BatchIndices):
            reseed(self._seed, BATCH, batch.position, self._rank)
        return self._fetch(batch)
