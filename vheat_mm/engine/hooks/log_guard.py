"""Logs that cannot be written do not end a training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmengine.runner import Runner

_WRITES = ('add_scalar', 'add_scalars', 'add_image')


def outlive_full_disk(runner: Runner) -> None:
    """Have the visualizer's backends leave out what they cannot write.

    MMEngine appends to ``scalars.json`` at each logging interval, and on a full disk the run ends there, long before
    it comes to saving a checkpoint.

    Args:
        runner: Its visualizer is changed, in place.
    """
    for backend in runner.visualizer._vis_backends.values():
        for name in _WRITES:
            setattr(backend, name, _tolerant(getattr(backend, name), runner))


def _tolerant(write: Callable, runner: Runner) -> Callable:
    failing = False

    @functools.wraps(write)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        nonlocal failing
        try:
            write(*args, **kwargs)
            failing = False
        except OSError as error:
            if not failing:  # once, and not at every interval until there is room again
                runner.logger.error(f'could not write the log of scalars or images: {error}; training goes on')
            failing = True

    return wrapper
