"""Processes of tests, forked from a server that has imported torch and MMEngine."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['mmengine.runner', 'vheat_mm'])


def run_alone(function: Callable, *arguments: object) -> int | None:
    """Call a function in another process; returns its exit code."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def join(rank: int, port: int) -> None:
    """Join the other process; fails after a minute without it."""
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', **address)
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))


def finish(result: object, rank: int, folder: Path) -> None:
    """Save the result for :func:`run_two` and end this process."""
    torch.save(result, folder / f'rank{rank}.pth')
    dist.destroy_process_group()
    os._exit(0)  # with gloo, PyTorch 2.13 may abort while the interpreter shuts down


def run_two(function: Callable, folder: Path, *arguments: object) -> list:
    """Call ``function(rank, port, folder, ...)``, which must join and finish, in two processes; returns the results."""
    arguments = (get_free_port(), folder, *arguments)
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method='forkserver')
    return [torch.load(folder / f'rank{rank}.pth') for rank in range(2)]
