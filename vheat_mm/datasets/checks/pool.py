"""Jobs in worker processes, which may die without taking the others' results with them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')

# Jobs that go to a worker at once: a message takes as long as a small picture.
CHUNK = 16
# Seconds after which a job is given up.
PATIENCE = 180


class Died(NamedTuple):
    """Stands for the result of a job whose process died, of a crash, a lack of memory, or after ``PATIENCE``."""


class _Task(NamedTuple, Generic[Job, Result]):
    function: Callable[[Job], Result]
    jobs: list[Job]
    patience: int


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    set_up: Callable[[], None] | None = None,
    patience: int = PATIENCE,
) -> Iterator[tuple[Job, Result | Died]]:
    """Run jobs in worker processes; yields each job with its result, in no particular order.

    A process that dies breaks its whole pool. The jobs that were under way then run again one by one, so that only
    the one that kills its process is lost. Few jobs are drawn ahead, so memory does not grow with their number.

    Args:
        function: Of the top level of a module; its exceptions are raised here.
        jobs: Picklable.
        workers: Number of processes.
        set_up: Runs first in each process.
        patience: Seconds for one job, after which its process is ended (not on Windows).
    """
    chunks = _in_chunks(jobs)
    pending: dict[Future, list[Job]] = {}
    pool = _start(workers, set_up)
    try:
        while True:
            suspects: list[Job] = []
            try:
                for chunk in islice(chunks, 3 * workers - len(pending)):
                    suspects = chunk
                    pending[pool.submit(_run, _Task(function, chunk, patience))] = chunk
                    suspects = []
            except BrokenProcessPool:
                pass  # the chunk that could not be submitted is in suspects
            if not pending and not suspects:
                return
            done = wait(pending, return_when=FIRST_COMPLETED).done
            broken = bool(suspects)
            for future in done:
                broken |= isinstance(future.exception(), BrokenProcessPool)
                if not broken:
                    yield from zip(pending.pop(future), future.result(), strict=True)
            if broken:
                pool.shutdown()
                for future, chunk in pending.items():
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects += chunk
                    else:
                        yield from zip(chunk, future.result(), strict=True)
                pending.clear()
                yield from _one_by_one(function, suspects, set_up, patience)
                pool = _start(workers, set_up)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_chunks(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    source = iter(jobs)
    while chunk := list(islice(source, CHUNK)):
        yield chunk


def _one_by_one(
    function: Callable[[Job], Result], jobs: list[Job], set_up: Callable[[], None] | None, patience: int
) -> Iterator[tuple[Job, Result | Died]]:
    pool = _start(1, set_up)
    try:
        for job in jobs:
            try:
                result: Result | Died = pool.submit(_run, _Task(function, [job], patience)).result()[0]
            except BrokenProcessPool:
                result = Died()
                pool.shutdown()
                pool = _start(1, set_up)
            yield job, result
    finally:
        pool.shutdown(cancel_futures=True)


def _start(workers: int, set_up: Callable[[], None] | None) -> ProcessPoolExecutor:
    # Forked processes have the libraries loaded already; each takes seconds to import them.
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn'
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(set_up, os.getpid()))


def _prepare(set_up: Callable[[], None] | None, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us, and says so once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    if set_up is not None:
        set_up()


def _end_with_parent(parent: int) -> None:
    # Not by the parent's sentinel: forked siblings hold each other's open.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run(task: _Task[Job, Result]) -> list[Result]:
    results = []
    for job in task.jobs:
        if hasattr(signal, 'alarm'):
            signal.alarm(task.patience)  # ends the process, also inside of a decoder
        results.append(task.function(job))
    if hasattr(signal, 'alarm'):
        signal.alarm(0)
    return results
