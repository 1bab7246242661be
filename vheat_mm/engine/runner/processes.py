"""Processes that share inputs and no tensors: what they tell each other goes through the store of torchrun."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from vheat_mm.utils.errors import ToolError, describe

PATIENCE = 1800.0  # seconds in which another process must get on, or start
_HURRY = 10.0  # the same once this process is to stop
_PAUSE = 0.2


class Processes:
    """This process and the others that torchrun has started, if it has.

    There is no process group: nothing is to be reduced, and a store can tell which process is missing.

    Attributes:
        rank: Of this process, from 0.
        count: Of processes.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self._store: Any = None
        if self.count > 1:
            store, *_ = next(iter(dist.rendezvous('env://', timeout=datetime.timedelta(seconds=PATIENCE))))
            self._store = dist.PrefixStore('vheat_mm', store)

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """What process 0 makes, in all processes.

        Args:
            name: Of the value; each is used once.
            make: Called by process 0; returns what JSON can hold.

        Raises:
            ToolError: Process 0 has failed to make it, which its own message says, or is missing.
        """
        if self._store is None:
            return make()
        if self.rank:
            value, error = json.loads(self._wait(name, 0, lambda: False))
            if error is not None:
                raise ToolError(f'process 0: {error}')
            return value
        try:
            value = make()
        except Exception as error:
            self._store.set(name, json.dumps([None, describe(error)]))
            raise
        self._store.set(name, json.dumps([value, None]))
        return value

    def get_on(self) -> None:
        """Tell the others that this process is not stuck."""
        if self._store is not None:
            self._store.add(f'progress of {self.rank}', 1)

    def gather(self, name: str, value: Any, hurry: Callable[[], bool] = lambda: False) -> tuple[list[Any], list[int]]:
        """Values of all processes, in process 0; nothing in the others.

        Args:
            name: Of the value; each is used once.
            value: Of this process; what JSON can hold.
            hurry: Whether to wait for a few seconds only.

        Returns:
            The values that came, and the ranks of the processes that did not get on for :data:`PATIENCE` seconds.
        """
        if self._store is None:
            return [value], []
        self._store.set(f'{name} of {self.rank}', json.dumps(value))
        if self.rank:
            return [], []
        came, missing = [value], []
        for rank in range(1, self.count):
            try:
                came.append(json.loads(self._wait(f'{name} of {rank}', rank, hurry)))
            except ToolError:
                missing.append(rank)
        return came, missing

    def leave(self) -> None:
        """Let the process that hosts the store end last, or after a few seconds."""
        if self._store is not None:
            self._store.add('left', 1)
            end = time.monotonic() + _HURRY
            while not self.rank and self._store.add('left', 0) < self.count and time.monotonic() < end:
                time.sleep(_PAUSE / 4)

    def _wait(self, key: str, rank: int, hurry: Callable[[], bool]) -> bytes:
        """The value of a key that another process sets."""
        seen, since = -1, time.monotonic()
        while not self._store.check([key]):
            self.get_on()
            progress = self._store.add(f'progress of {rank}', 0)
            if progress != seen:
                seen, since = progress, time.monotonic()
            limit = _HURRY if hurry() else PATIENCE
            if time.monotonic() - since > limit:
                raise ToolError(f'process {rank} of {self.count} has not got on for {limit:.0f} seconds')
            time.sleep(_PAUSE)
        return self._store.get(key)
