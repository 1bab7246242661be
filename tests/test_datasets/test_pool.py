"""Worker processes that crash, hang or lose their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from data_checks import DETECTION, check, dataset

from vheat_mm.datasets.checks import pool


def _half(job: int) -> float:
    if job == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == 44:
        time.sleep(60)
    return job / 2


@pytest.mark.parametrize('workers', [1, 2])
def test_crash_or_timeout_costs_one_job(workers):
    started = time.monotonic()
    results = dict(pool.run_jobs(_half, range(100), workers, timeout=0.5))
    assert results == {job: job / 2 for job in range(100)} | {33: pool.WorkerCrash(), 44: pool.WorkerCrash()}
    assert time.monotonic() - started < 20


def test_every_worker_may_crash():
    """Of many crashes in a row, each costs its job; jobs that are queued behind them run in the next worker."""
    results = dict(pool.run_jobs(_crash_on_even, range(20), 2))
    assert results == {job: pool.WorkerCrash() if job % 2 == 0 else job for job in range(20)}


def _crash_on_even(job: int) -> int:
    if job % 2 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def _run_slow_jobs(folder: Path) -> None:
    list(pool.run_jobs(_sign_and_wait, [folder] * 40, 2))


def _sign_and_wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='asks /proc who runs')
def test_workers_exit_with_a_killed_parent(tmp_path):
    check = multiprocessing.get_context('fork').Process(target=_run_slow_jobs, args=(tmp_path,))
    check.start()
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    check.kill()
    check.join()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    until(lambda: not any(map(runs, pids)))


def runs(pid: int) -> bool:
    """Whether a process runs and is no zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def until(condition) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail('not within ten seconds')


def _fail(job: int) -> None:
    raise ZeroDivisionError(job)


def test_exceptions_of_jobs_are_raised():
    with pytest.raises(ZeroDivisionError):
        list(pool.run_jobs(_fail, range(3), 1))


def test_jobs_are_taken_as_needed():
    """Memory does not grow with the number of jobs."""
    drawn = []
    jobs = (drawn.append(i) or i for i in range(10**9))
    results = pool.run_jobs(abs, jobs, 1)
    for _ in range(10):
        next(results)
    results.close()
    assert len(drawn) < 1000


def test_decoder_crash_is_a_finding(coco, monkeypatch):
    """The function is looked up in forked workers, so they see the patch."""
    monkeypatch.setattr('mmcv.imfrombytes', lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    report = check('mmdet', train=dataset(DETECTION, coco['good']))
    assert report.counts == {'decoder-crash': 4}
