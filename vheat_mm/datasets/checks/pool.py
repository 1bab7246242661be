"""Worker processes of which one may crash or hang without losing more than its job.

Neither ``concurrent.futures`` nor ``multiprocessing.Pool`` does that: the first fails all jobs that are under way when
a worker dies, the second waits for the lost result forever.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')

# Seconds after which a job is given up.
TIMEOUT = 180.0
# Jobs sent to a worker in advance, so that it never waits for the next one.
QUEUED = 4


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
    context = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')
    source = iter(jobs)
    running: dict[Connection, tuple[BaseProcess, deque[Job]]] = {}

    def start(queue: deque[Job]) -> None:
        if queue:
            ours, theirs = context.Pipe()
            arguments = (theirs, os.getpid(), function, set_up, timeout)
            process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
            process.start()
            theirs.close()  # so that reading our end fails once the worker is gone
            running[ours] = process, queue
            send(ours, *queue)

    def send(connection: Connection, *new: Job) -> None:
        with contextlib.suppress(OSError):  # the worker has crashed: its queue goes to the next one
            for job in new:
                connection.send(job)

    def stop(connection: Connection) -> None:
        process, _ = running.pop(connection)
        process.kill()
        process.join()
        connection.close()

    try:
        for _ in range(workers):
            start(deque(islice(source, QUEUED)))
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                queue = running[connection][1]
                job, new = queue.popleft(), list(islice(source, 1))
                queue += new
                result: Result | Exception | WorkerCrash
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    result = WorkerCrash()
                if isinstance(result, Exception):
                    raise result
                if isinstance(result, WorkerCrash) or not queue:
                    stop(connection)
                    start(queue)
                else:
                    send(connection, *new)
                yield job, result
    finally:
        for connection in list(running):
            stop(connection)


def _work(
    connection: Connection,
    parent: int,
    function: Callable[[Job], Result],
    set_up: Callable[[], None] | None,
    timeout: float,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    try:
        if set_up is not None:
            set_up()
        while True:
            job = connection.recv()
            _set_timer(timeout)  # its signal kills the process, also inside of a decoder
            result = function(job)
            _set_timer(0)
            connection.send(result)
    except Exception as error:
        connection.send(error)


def _set_timer(seconds: float) -> None:
    if hasattr(signal, 'setitimer'):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _exit_with_parent(parent: int) -> None:
    # The pipe does not tell: workers forked later hold the parent's end open.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
