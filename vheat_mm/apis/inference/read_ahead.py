"""A process that prepares inputs while the network runs, of which a crash costs one input.

PyTorch's DataLoader is not used for this: it reports a dead worker by an exception in whatever the main thread does at
that moment, which may be the caller's loop, and what the worker had prepared before is lost.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import torch

from vheat_mm.datasets.checks.pool import TIMEOUT, set_timer
from vheat_mm.utils.process import end_with_parent

Job = TypeVar('Job')
Result = TypeVar('Result')
_RESULT, _DONE, _ERROR = 'result', 'done', 'error'
_PATIENCE = 1.0  # seconds for a process to end by itself
_starting = threading.Lock()  # a process that another thread forks would hold a pipe open


class WorkerDied(NamedTuple):
    """In place of a job's (further) results.

    Attributes:
        reason: One line.
    """

    reason: str


def read_ahead(
    function: Callable[[Job], Iterable[Result]], jobs: Sequence[Job], ahead: int, timeout: float = TIMEOUT
) -> Iterator[tuple[Job, Result | WorkerDied]]:
    """Yield each job with each of its results, in order; a process of its own computes them in advance.

    Inside a daemon process, which may start no others, they are computed when they are asked for.

    Args:
        function: Its exceptions are raised here. Results are pickled, so nothing stays in shared memory.
        jobs: Of one or more results each.
        ahead: Number of results that may wait.
        timeout: Seconds for one result, after which the process is ended (not on Windows).
    """
    if multiprocessing.current_process().daemon:
        yield from ((job, result) for job in jobs for result in function(job))
        return
    # Forked processes have the libraries loaded already; importing them takes seconds.
    context: Any = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')
    # The system takes the thread that starts a process for its parent, and another one may consume the results.
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
    start = 0
    while start < len(jobs):
        with _starting:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, ours, parent, function, jobs, start, timeout)
            # From this thread, while the network does not run: a process forked meanwhile would get its locks as they
            # are.
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that reading our end fails once the process is gone
        arrived: queue.Queue = queue.Queue(max(1, ahead))
        ended = threading.Event()
        receiver = threading.Thread(target=_receive, args=(ours, arrived, ended), daemon=True)
        receiver.start()
        try:
            while start < len(jobs) and (message := arrived.get()) is not None:
                kind, result = pickle.loads(message)
                if kind == _ERROR:
                    raise result
                if kind == _RESULT:
                    yield jobs[start], result
                else:
                    start += 1
            if start < len(jobs):
                process.join()
                yield jobs[start], WorkerDied(_reason(process.exitcode, timeout))
                start += 1
        finally:
            ended.set()
            process.terminate()  # it removes what it has downloaded
            process.join(_PATIENCE)
            process.kill()
            process.join()
            receiver.join()
            ours.close()


def _reason(status: int | None, timeout: float) -> str:
    if status is None or status >= 0:
        return f'the process that reads it has ended with status {status}'
    name = signal.Signals(-status).name
    hints = dict(SIGALRM=f': it took more than {timeout:g} seconds', SIGKILL=': the memory may not suffice')
    return f'the process that reads it was ended by {name}{hints.get(name, ": its decoder crashes")}'


def _receive(connection: Connection, arrived: queue.Queue, ended: threading.Event) -> None:
    """Hand on messages, and ``None`` after the last: the process can go on while the network runs."""
    message: bytes | None = b''
    while message is not None and not ended.is_set():
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            message = None
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                arrived.put(message, timeout=0.1)
                break


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, by value; torch.multiprocessing's would end with the process that sent them."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def _work(
    connection: Connection,
    other_end: Connection,
    parent: int | None,
    function: Callable[[Job], Iterable[Result]],
    jobs: Sequence[Job],
    start: int,
    timeout: float,
) -> None:
    """Send each job's results, then that it is done: so the parent knows which job a crash belongs to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    set_timer(timeout)  # its signal ends the process, also inside of a decoder
    if parent is not None:
        end_with_parent(signal.SIGKILL, parent)
    other_end.close()  # so that sending fails once the parent is gone
    torch.set_num_threads(1)  # the threads of the parent's pools do not exist here
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)

    def send(kind: str, result: Any = None) -> None:
        set_timer(0)  # waiting for the network is no fault of the input
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=5).dump((kind, result))
        connection.send_bytes(buffer.getbuffer())
        set_timer(timeout)

    try:
        for job in itertools.islice(jobs, start, None):
            for result in function(job):
                send(_RESULT, result)
            send(_DONE)
        set_timer(0)
    except ConnectionError:  # the parent needs no more
        pass
    except Exception as error:
        send(_ERROR, error)
