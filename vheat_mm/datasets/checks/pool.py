"""Worker processes of which one may crash or hang without losing more than its job.

Neither ``concurrent.futures`` nor ``multiprocessing.Pool`` does that: the first fails all jobs that are under way when
a worker dies, the second waits for the lost result forever. Here each process gets a batch of jobs and sends a result
for each; if it dies, the number of results tells the job that killed it, and a new process gets the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from vheat_mm.utils.process import end_with_parent

Job = TypeVar('Job')
Result = TypeVar('Result')

# Seconds after which a job is given up.
TIMEOUT = 180.0
# Jobs of a process: few at first, so that few jobs occupy all processes. Forking one takes some ten milliseconds.
FIRST_BATCH, LARGEST_BATCH = 4, 256


class WorkerCrash(NamedTuple):
    """Result of a job whose worker crashed, was killed (for example for lack of memory), or ran into the timeout."""


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    set_up: Callable[[], None] | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[tuple[Job, Result | WorkerCrash]]:
    """Run jobs in worker processes; yields each job with its result, in no particular order.

    Few jobs are taken in advance, so memory does not grow with their number.

    Args:
        function: Defined at the top level of a module; its exceptions are raised here.
        jobs: Picklable.
        workers: Number of processes.
        set_up: Called first in each process.
        timeout: Seconds for one job, after which its worker is killed (not on Windows).
    """
    # Forked processes have the libraries loaded already; importing them takes seconds.
    context: Any = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')
    source = iter(jobs)
    size = FIRST_BATCH
    running: dict[Connection, tuple[BaseProcess, deque[Job]]] = {}

    def start(batch: deque[Job]) -> None:
        if batch:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, os.getpid(), function, batch, set_up, timeout))
            process.daemon = True
            process.start()
            theirs.close()  # so that reading our end fails once the worker is gone
            running[ours] = process, batch

    def stop(connection: Connection) -> None:
        process, _ = running.pop(connection)
        process.kill()
        process.join()
        connection.close()

    try:
        for _ in range(workers):
            start(deque(islice(source, size)))
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                batch = running[connection][1]
                result: Result | Exception | WorkerCrash
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    result = WorkerCrash()
                if isinstance(result, Exception):
                    raise result
                job = batch.popleft()
                if isinstance(result, WorkerCrash) or not batch:
                    stop(connection)
                    size = min(size + 1, LARGEST_BATCH)
                    start(batch or deque(islice(source, size)))
                yield job, result
    finally:
        for connection in list(running):
            stop(connection)


def _work(
    connection: Connection,
    parent: int,
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    set_up: Callable[[], None] | None,
    timeout: float,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL, parent)
    try:
        if set_up is not None:
            set_up()
        for job in jobs:
            set_timer(timeout)  # its signal kills the process, also inside of a decoder
            result = function(job)
            set_timer(0)
            connection.send(result)
    except Exception as error:
        connection.send(error)


def set_timer(seconds: float) -> None:
    """End this process after so many seconds by a signal, also inside of a decoder; 0 for not (not on Windows)."""
    if hasattr(signal, 'setitimer'):
        signal.setitimer(signal.ITIMER_REAL, seconds)
