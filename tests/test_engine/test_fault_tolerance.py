"""Trainings that are interrupted and resumed."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from processes import finish, join, run_alone, run_two
from small_runs import ALL_HOOKS, CountedScore, RecordBatches, train

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.resume import find_newest
from vheat_mm.engine.fileio import AtomicLocalBackend
from vheat_mm.engine.hooks import ReproducibleHook, StopSignalHook, atomic_checkpoint_hook
from vheat_mm.engine.runner.build import FAULT_TOLERANCE_HOOKS, add_fault_tolerance_hooks
from vheat_mm.utils.errors import CheckpointError, StopRequested

ATOMIC = dict(type='AtomicCheckpointHook')
EPOCHS, ITERATIONS = (True, 3), (False, 11)  # both with data for 4 iterations a pass

# --- resumed equals uninterrupted


CASES = [
    pytest.param(*EPOCHS, 0, 'DefaultSampler', {}, id='epochs, main process'),
    pytest.param(*EPOCHS, 2, 'DefaultSampler', {}, id='epochs, workers'),
    pytest.param(*EPOCHS, 2, 'DefaultSampler', dict(persistent=True), id='epochs, persistent workers'),
    pytest.param(*EPOCHS, 0, 'DefaultSampler', dict(accumulate=3, ema=True), id='epochs, accumulation, average'),
    pytest.param(*ITERATIONS, 0, 'InfiniteSampler', {}, id='iterations, main process'),
    pytest.param(*ITERATIONS, 2, 'InfiniteSampler', dict(persistent=True), id='iterations, workers'),
    pytest.param(*ITERATIONS, 2, 'DefaultSampler', {}, id='iterations over a finite sampler'),
    pytest.param(
        *ITERATIONS, 0, 'InfiniteSampler', dict(accumulate=2, ema=True), id='iterations, accumulation, average'
    ),
]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-7)
    for batch, expected in zip(ours[1], theirs[1][-len(ours[1]) :], strict=True):
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)


@pytest.mark.parametrize(('by_epoch', 'length', 'workers', 'sampler', 'options'), CASES)
def test_ended_by_a_signal_and_resumed_equals_uninterrupted(tmp_path, by_epoch, length, workers, sampler, options):
    """Interrupted within the first epoch, at its end, within the second, and before the last iteration."""
    common = dict(sampler=sampler, hooks=ALL_HOOKS, checkpoint=ATOMIC, **options)
    full = train(tmp_path / 'full', by_epoch, workers, length, **common)
    total = length * 4 if by_epoch else length
    assert len(full[1]) == total
    for after in (1, 6) if workers else (1, 4, 6, total - 1):
        folder = tmp_path / f'{after}'
        with pytest.raises(StopRequested) as stop:
            train(folder, by_epoch, workers, length, **common, send=dict(after=after))
        assert stop.value.code == 75
        again = train(folder, by_epoch, workers, length, **common, resume=True)
        assert len(again[1]) == total - after
        assert_same(again, full)


@pytest.mark.parametrize(('by_epoch', 'stop'), [(True, 'epoch_2.pth'), (False, 'iter_6.pth')])
def test_resumed_from_a_regular_checkpoint_with_other_workers(tmp_path, by_epoch, stop):
    """With MMEngine's own checkpoint hook."""
    length = 3 if by_epoch else 9
    full = train(tmp_path / 'full', by_epoch, 0, length)
    again = train(tmp_path / 'again', by_epoch, 2, length, resume=str(tmp_path / 'full' / stop))
    assert len(again[1]) == (4 if by_epoch else 3)
    assert_same(again, full)


def test_checkpoint_by_iteration_in_a_loop_by_epoch(tmp_path):
    """Resuming continues within the epoch, where MMEngine repeats the whole epoch."""
    every_three = dict(by_epoch=False, interval=3)
    full = train(tmp_path / 'full', True, 0, 3, checkpoint=every_three)
    again = train(tmp_path / 'again', True, 0, 3, resume=str(tmp_path / 'full' / 'iter_6.pth'))
    assert len(again[1]) == 6
    assert_same(again, full)


def test_without_the_hook_resumed_training_differs(tmp_path):
    """If a later MMEngine restores random states, this test fails and the hook can be removed."""
    full, _ = train(tmp_path / 'full', True, 0, 3, hooks=())
    again, _ = train(tmp_path / 'again', True, 0, 3, hooks=(), resume=str(tmp_path / 'full' / 'epoch_2.pth'))
    assert (full - again).abs().max() > 1e-6


def test_numbers_drawn_by_other_hooks_do_not_matter(tmp_path):
    ours, _ = train(tmp_path / 'ours', True, 2, 2)
    theirs, _ = train(tmp_path / 'theirs', True, 2, 2, drawn=3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(('by_epoch', 'sampler'), [(True, 'DefaultSampler'), (False, 'InfiniteSampler')])
def test_passes_differ(tmp_path, workers, by_epoch, sampler):
    """Each pass over the data has its own order and augmentation, drawn with numpy and with PyTorch."""
    _, batches = train(tmp_path / 'run', by_epoch, workers, 3 if by_epoch else 12, sampler=sampler)
    passes = [torch.cat(batches[i : i + 4], dim=1) for i in (0, 4, 8)]
    assert len({tuple(drawn[0].tolist()) for drawn in passes}) == 3
    assert all(sorted(drawn[0].tolist()) == list(range(8)) for drawn in passes)
    noise = torch.cat(passes, dim=1)[1:].flatten().tolist()
    assert len(set(noise)) == len(noise) == 3 * 8 * 2


@pytest.mark.parametrize('hook', [*ALL_HOOKS, None])
@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler'])
def test_each_hook_alone(tmp_path, hook, sampler):
    _, batches = train(tmp_path, False, 0, 9, hooks=[hook] if hook else [], sampler=sampler)
    drawn = torch.cat(batches, dim=1)[0].tolist()
    assert sorted(drawn[:8]) == sorted(drawn[8:16]) == list(range(8))


def test_resumed_without_a_seed_in_the_config(tmp_path):
    """Each start draws a seed before it reads that of the checkpoint."""
    full = train(tmp_path / 'full', True, 0, 3, seed=None)
    again = train(tmp_path / 'again', True, 0, 3, seed=None, resume=str(tmp_path / 'full' / 'epoch_2.pth'))
    assert_same(again, full)


def in_two_processes(rank: int, port: int, folder: Path, options: dict, after: int) -> None:
    join(rank, port)
    put = AtomicLocalBackend.put

    def slow(self, obj, filepath):
        time.sleep(0.3)
        put(self, obj, filepath)

    train(folder / 'full', **options)
    AtomicLocalBackend.put = slow
    with pytest.raises(StopRequested) as stop:
        train(folder / 'again', **options, send=None if rank else dict(in_validation=2))
    with pytest.raises(StopRequested) as stop:
        train(folder / 'again', **options, resume=True, send=dict(after=after) if rank else None)
    assert 'interrupted.pth' in stop.value.message
    assert (folder / 'again' / 'interrupted.pth').is_file()  # on both ranks
    train(folder / 'again', **options, resume=True)
    finish(None, rank, folder)


def test_two_processes_that_accumulate_gradients(tmp_path):
    """One of them gets a signal: first in a validation, then between two optimizer steps."""
    options = dict(by_epoch=True, workers=0, length=3, hooks=ALL_HOOKS, checkpoint=ATOMIC, accumulate=3, validate=1)
    run_two(in_two_processes, tmp_path, options, 4)
    ours, theirs = (read_checkpoint(tmp_path / name / 'epoch_3.pth') for name in ('again', 'full'))
    assert ours['meta']['iter'] == theirs['meta']['iter'] == 6
    for key, value in ours['state_dict'].items():
        torch.testing.assert_close(value, theirs['state_dict'][key], rtol=0, atol=1e-6)


# --- signals


def test_signal_while_validating(tmp_path):
    """The state is saved before the validation ends; then the run ends."""
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC | dict(interval=5), validate=1)
    full = train(tmp_path / 'full', True, 0, 3, **options)
    runs = CountedScore.runs
    with pytest.raises(StopRequested, match='75'):
        train(tmp_path / 'again', True, 0, 3, **options, send=dict(in_validation=8))
    assert CountedScore.runs == runs + 2
    again = train(tmp_path / 'again', True, 0, 3, **options, resume=True)
    assert len(again[1]) == 4
    assert_same(again, full)


def test_killed_in_a_validation_after_a_signal(tmp_path, monkeypatch):
    """EMAHook has then swapped in the averaged weights."""
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC | dict(interval=5), validate=1, ema=True)
    full = train(tmp_path / 'full', True, 0, 3, **options)

    after_val = StopSignalHook.after_val

    def killed(hook, runner):
        if hook._received:
            raise SystemExit('killed')

    monkeypatch.setattr(StopSignalHook, 'after_val', killed)
    with pytest.raises(SystemExit, match='killed'):
        train(tmp_path / 'again', True, 0, 3, **options, send=dict(in_validation=8))
    monkeypatch.setattr(StopSignalHook, 'after_val', after_val)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    again = train(tmp_path / 'again', True, 0, 3, **options, resume=True)
    assert len(again[1]) == 4
    assert_same(again, full)
    averages = [read_checkpoint(tmp_path / name / 'epoch_3.pth')['state_dict'] for name in ('full', 'again')]
    assert all(torch.equal(averages[0][key], averages[1][key]) for key in averages[0])


def test_signal_before_a_validation_of_an_iteration_based_loop(tmp_path):
    """It is run after resuming."""
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, validate=4, sampler='InfiniteSampler')
    runs = CountedScore.runs
    with pytest.raises(StopRequested):
        train(tmp_path, False, 0, 8, **options, send=dict(after=4))
    assert CountedScore.runs == runs
    train(tmp_path, False, 0, 8, **options, resume=True)
    assert CountedScore.runs == runs + 2


@HOOKS.register_module()
class SignalWorkers(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)  # a sender other than the parent


def test_signals_to_workers_do_not_end_the_training(tmp_path):
    """A cluster signals every process of a job, and PyTorch's workers would exit."""
    hooks = (*ALL_HOOKS, 'SignalWorkers')
    _, batches = train(tmp_path, False, 2, 6, hooks=hooks, sampler='InfiniteSampler')
    assert len(batches) == 6


def test_signal_handlers_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, True, 0, 1, hooks=ALL_HOOKS)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize('signals', ['SIGTERM', ['TERM']])
def test_unknown_signals(signals):
    with pytest.raises(ValueError, match='SIGUSR1'):
        StopSignalHook(signals=signals)


# --- checkpoint files


def test_files_are_written_atomically(tmp_path):
    backend = AtomicLocalBackend()
    target = tmp_path / 'new' / 'x.pth'
    backend.put(b'first', target)
    with pytest.raises(TypeError):
        backend.put('not bytes', target)
    assert target.read_bytes() == b'first'
    assert list(target.parent.iterdir()) == [target]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.fixture
def run(tmp_path) -> Path:
    """A work dir with the checkpoints of three epochs."""
    train(tmp_path / 'run', True, 0, 3, checkpoint=ATOMIC)
    return tmp_path / 'run'


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(read_checkpoint(path)['state_dict']['layers.0.weight'].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    'damage',
    [flip_bit, lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b''), Path.unlink],
    ids=['one bit', 'truncated', 'empty', 'gone'],
)
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(run, damage):
    damage(run / 'epoch_3.pth')
    path, notes = find_newest(run)
    assert path == str(run / 'epoch_2.pth')
    assert ['epoch_3.pth' in note for note in notes] == [True]
    again = train(run, True, 0, 3, checkpoint=ATOMIC, resume=True)  # MMEngine alone would take epoch_3.pth
    assert len(again[1]) == 4


def test_training_does_not_start_from_scratch_if_all_checkpoints_are_corrupt(run):
    for path in run.glob('*.pth'):
        flip_bit(path)
    last = (run / 'last_checkpoint').read_text()
    for named in (last, os.path.relpath(last)):  # relative and absolute paths name the same files
        (run / 'last_checkpoint').write_text(named)
        for folder in (run, os.path.relpath(run)):
            with pytest.raises(CheckpointError, match=r'(?s)no intact checkpoint.*epoch_1.pth.*start from scratch'):
                find_newest(folder)


def test_hooks_are_added_once():
    classes = (
        dict(type=ReproducibleHook),
        dict(type='mmengine.StopSignalHook'),
        dict(type='vheat_mm.engine.hooks.NonFiniteGuardHook'),
    )
    cfg = Config(dict(custom_hooks=[*classes], default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3))))
    add_fault_tolerance_hooks(cfg)
    assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=3)
    assert len(cfg.custom_hooks) == len(FAULT_TOLERANCE_HOOKS)
    assert cfg.custom_hooks[3:] == [dict(type='SkipBrokenSamplesHook'), dict(type='UnusedParametersHook')]


# What is called, and at which call the process is killed.
MOMENTS = {
    'before the flush': (os, 'fsync', 9),
    'before the rename': (Path, 'replace', 5),
    'between checkpoint and last_checkpoint': (Path, 'replace', 6),
    'between the first checkpoint and run.json': (Path, 'replace', 3),
    'before the old one is removed': (atomic_checkpoint_hook, '_remove', 1),
}


def train_and_die(moment: str, folder: Path) -> None:
    owner, name, number = MOMENTS[moment]
    original, calls = getattr(owner, name), itertools.count(1)

    def kill_or_call(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, kill_or_call)
    train(folder, True, 0, 3, hooks=ALL_HOOKS, checkpoint=ATOMIC | dict(max_keep_ckpts=1))


@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_while_saving(tmp_path, moment):
    """With max_keep_ckpts=1, there is an intact checkpoint at any moment."""
    assert run_alone(train_and_die, moment, tmp_path / 'killed') == -signal.SIGKILL
    parts = list((tmp_path / 'killed').glob('.*.part'))
    assert len(parts) == ('before the flush' in moment or 'rename' in moment or 'between' in moment)
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC | dict(max_keep_ckpts=1))
    full = train(tmp_path / 'full', True, 0, 3, **options)
    again = train(tmp_path / 'killed', True, 0, 3, **options, resume=True)
    assert len(again[1]) in (4, 8)
    assert_same(again, full)
    assert [path.name for path in (tmp_path / 'killed').glob('*epoch*')] == ['epoch_3.pth']
    assert not list((tmp_path / 'killed').glob('.*'))


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full after ``full_disk[0]`` writes."""
    left = [0]
    put = AtomicLocalBackend.put

    def limited(self, obj, filepath):
        if str(filepath).endswith('.pth'):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, 'No space left on device', str(filepath))
        put(self, obj, filepath)

    monkeypatch.setattr(AtomicLocalBackend, 'put', limited)
    return left


def test_full_disk_keeps_training_and_checkpoints(tmp_path, full_disk, capfd):
    full_disk[0] = 1
    with pytest.raises(OSError, match=r'No space.*epoch_3.pth'):
        train(tmp_path, True, 0, 3, hooks=ALL_HOOKS, checkpoint=ATOMIC | dict(max_keep_ckpts=1))
    assert len(RecordBatches.batches) == 12  # trained to the end
    assert [path.name for path in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert find_newest(tmp_path) == (str(tmp_path / 'epoch_1.pth'), [])
    assert 'epoch_2.pth' in capfd.readouterr().out


def test_full_disk_while_logging(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('mmengine.visualization.LocalVisBackend._dump', full)
    train(tmp_path, True, 0, 2, hooks=ALL_HOOKS, checkpoint=ATOMIC, logged=1)
    assert (tmp_path / 'epoch_2.pth').exists()
    with pytest.raises(OSError, match='No space'):
        train(tmp_path, True, 0, 2, logged=1)  # MMEngine alone


def test_the_last_save_is_retried(tmp_path, full_disk):
    full_disk[0] = 2
    train(tmp_path / 'a', True, 0, 2, hooks=ALL_HOOKS, checkpoint=ATOMIC)
    full_disk[0] = 0
    save = AtomicLocalBackend.put

    def after_two(self, obj, filepath):
        if full_disk[0] == -2:
            full_disk[0] = 1
        save(self, obj, filepath)

    AtomicLocalBackend.put = after_two
    train(tmp_path / 'b', True, 0, 2, hooks=ALL_HOOKS, checkpoint=ATOMIC)
    ours, theirs = (read_checkpoint(tmp_path / name / 'epoch_2.pth') for name in 'ab')
    assert ours['meta']['iter'] == theirs['meta']['iter'] == 8
    assert ours['meta']['epoch'] == theirs['meta']['epoch'] == 2


def test_full_disk_keeps_the_best_checkpoint(tmp_path, full_disk):
    best = ATOMIC | dict(save_best='score', rule='greater', interval=5)
    full_disk[0] = 1  # only the first best checkpoint is written
    with pytest.raises(OSError, match='No space'):
        train(tmp_path, True, 0, 2, hooks=ALL_HOOKS, checkpoint=best, validate=1)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['best_score_epoch_1.pth']


def test_the_best_checkpoint_is_replaced(tmp_path):
    best = ATOMIC | dict(save_best='score', rule='greater', max_keep_ckpts=1)
    train(tmp_path, True, 0, 3, hooks=ALL_HOOKS, checkpoint=best, validate=1)
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['best_score_epoch_3.pth', 'epoch_3.pth']
