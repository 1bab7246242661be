"""Write errors of scalar and image logs do not end a training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmengine.runner import Runner


def ignore_log_write_errors(runner: Runner) -> None:
    """Make the visualizer's backends log an ``OSError`` and continue.

    MMEngine appends to ``scalars.json`` at each logging interval. On a full disk the training would end there, before
    it saves a checkpoint.

    Args:
        runner: The backends of its visualizer are changed in place.
    """
    for backend in runner.visualizer._vis_backends.values():
        for name in ('add_scalar', 'add_scalars', 'add_image'):
            setattr(backend, name, _ignore_errors(getattr(backend, name), runner))


def _ignore_errors(write: Callable, runner: Runner) -> Callable:
    failing = False

    @functools.wraps(write)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        nonlocal failing
        try:
            write(*args, **kwargs)
            failing = False
        except OSError as error:
            if not failing:  # once, not at every logging interval
                runner.logger.error(f'could not write the log of scalars or images: {error}; training continues')
            failing = True

    return wrapper
