"""Two processes of a test, joined by gloo."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def join(rank: int, port: int) -> None:
    """Join the other process; one that waits for another that never comes fails, and does not hang."""
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', **address)
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))


def leave(result: object, rank: int, folder: Path) -> None:
    """End this process, and leave its result for the test."""
    torch.save(result, folder / f'rank{rank}.pth')
    dist.destroy_process_group()
    os._exit(0)  # gloo (PyTorch 2.13) may abort while the interpreter shuts down


def run_two(function: Callable, folder: Path, *arguments: object) -> list:
    """Call ``function(rank, port, folder, ...)``, which joins and leaves, in two processes; returns both results."""
    torch.multiprocessing.spawn(function, (free_port(), folder, *arguments), nprocs=2)
    return [torch.load(folder / f'rank{rank}.pth') for rank in range(2)]
