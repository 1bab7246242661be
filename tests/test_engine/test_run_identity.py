"""A run goes on from its own checkpoints only, whatever else lies in its folder and whatever a checkpoint says."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader
from processes import finish, join, run_two
from small_runs import train

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.resume import RUN_ID, find_newest
from vheat_mm.checkpoint.run import LAUNCH, Run
from vheat_mm.checkpoint.run_folder import lock, release
from vheat_mm.engine import fileio
from vheat_mm.utils.errors import CheckpointError, ToolError

ATOMIC = dict(type='AtomicCheckpointHook')


@pytest.fixture(scope='module')
def original(tmp_path_factory) -> Path:
    """The work dir of a finished run of three epochs."""
    folder = tmp_path_factory.mktemp('original') / 'run'
    train(folder, True, 0, 3, checkpoint=ATOMIC)
    return folder


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy of it under another path; ``last_checkpoint`` still names the original's file."""
    return Path(shutil.copytree(original, tmp_path / 'run'))


def newest(work_dir: Path, **options: str) -> tuple[str | None, str]:
    path, notes = find_newest(work_dir, **options)
    return path and Path(path).name, ' | '.join(notes)


def change(path: Path, meta: dict | None = None, **info: object) -> None:
    checkpoint = read_checkpoint(path)
    checkpoint['meta'].update(meta or {})
    checkpoint['message_hub']['runtime_info'].update(info)
    checkpoint['message_hub']['resumed_keys'].update(dict.fromkeys(info, True))
    torch.save(checkpoint, path)


def run_id(path: Path) -> str:
    return read_checkpoint(path)['meta'][RUN_ID]


# --- which checkpoint


def test_a_copied_work_dir_is_a_run_of_its_own(original, run):
    before = {path: path.read_bytes() for path in original.glob('*.pth')}
    again = train(run, True, 0, 5, checkpoint=ATOMIC | dict(max_keep_ckpts=1), resume=True)
    assert len(again[1]) == 8
    assert {path: path.read_bytes() for path in original.glob('*.pth')} == before
    assert run_id(run / 'epoch_5.pth') == run_id(original / 'epoch_3.pth')


def test_the_highest_iteration_of_the_run_counts(run):
    """Not times, nor ``last_checkpoint``: the clock may have gone back, or the run was killed between two files."""
    (run / 'last_checkpoint').write_text(str(run / 'epoch_2.pth'))
    os.utime(run / 'epoch_3.pth', (0, 0))
    assert newest(run) == ('epoch_3.pth', '')


def test_other_files_do_not_count(run, tmp_path):
    """A checkpoint of another run is passed over; strays, links out of the folder, pipes and folders are not opened."""
    train(tmp_path / 'other', True, 0, 1, checkpoint=ATOMIC)
    change(tmp_path / 'other' / 'epoch_1.pth', dict(iter=99))
    (tmp_path / 'other' / 'epoch_1.pth').rename(run / 'epoch_4.pth')
    (run / 'epoch_5.pth').symlink_to('/dev/zero')
    os.mkfifo(run / 'epoch_6.pth')
    (run / 'epoch_7.pth').symlink_to(run / 'epoch_7.pth')
    (run / 'downloaded.pth').write_text('not a checkpoint')
    (run / 'folder.pth').mkdir()
    name, notes = newest(run)
    assert name == 'epoch_3.pth'
    assert 'of other runs are passed over: epoch_4.pth (epoch 1, iteration 99' in notes
    assert all(notes.count(f'epoch_{number}.pth is not used') == 1 for number in (5, 6, 7))
    assert 'downloaded' not in notes


@pytest.mark.parametrize('content', [b'\0\xff', b'', b'/' * 5000, b'/dev/zero', b'/etc/passwd', None], ids=repr)
def test_an_odd_last_checkpoint_is_none(run, content):
    (run / 'last_checkpoint').unlink()
    if content is None:
        (run / 'last_checkpoint').symlink_to('last_checkpoint')
    else:
        (run / 'last_checkpoint').write_bytes(content)
    name, notes = newest(run)
    assert (name, notes.count('last_checkpoint is not used')) == ('epoch_3.pth', 1)


def test_abandoned_later_checkpoints(run):
    """After resuming from an earlier checkpoint by name, another run begins: its last one counts."""
    train(run, True, 0, 2, checkpoint=ATOMIC, resume=str(run / 'epoch_1.pth'))
    name, notes = newest(run)
    assert name == 'epoch_2.pth'
    assert 'passed over: epoch_1.pth' in notes
    assert 'epoch_3.pth' in notes
    assert run_id(run / 'epoch_2.pth') != run_id(run / 'epoch_3.pth')


def test_from_its_own_newest_by_name_the_run_goes_on(run):
    train(run, True, 0, 4, checkpoint=ATOMIC, resume=str(run / 'epoch_3.pth'))
    assert run_id(run / 'epoch_4.pth') == run_id(run / 'epoch_3.pth')


@HOOKS.register_module()
class StopAtOnce(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise KeyboardInterrupt


def test_a_start_that_saved_nothing_does_not_hide_the_run(run):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(run, True, 0, 3, checkpoint=ATOMIC, hooks=('StopAtOnce',))
    assert newest(run)[0] == 'epoch_3.pth'


def test_folders_without_run_json(run, tmp_path):
    """One id is adopted, of several none; without ids ``last_checkpoint`` counts, else the iteration."""
    (run / 'run.json').write_bytes(b'[' * 10000)
    name, notes = newest(run)
    assert name == 'epoch_3.pth'
    assert 'run.json' in notes
    (run / 'run.json').unlink()
    change(run / 'epoch_3.pth', {RUN_ID: 32 * 'a'})
    with pytest.raises(CheckpointError, match=r'several runs: epoch_1.pth.*--resume PATH'):
        find_newest(run)
    for number in (1, 2, 3):
        change(run / f'epoch_{number}.pth', {RUN_ID: None})
    assert newest(run)[0] == 'epoch_3.pth'
    (run / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth')
    assert newest(run)[0] == 'epoch_2.pth'
    (run / 'epoch_2.pth').write_bytes(b'')
    assert newest(run)[0] == 'epoch_3.pth'
    again = train(run, True, 0, 4, checkpoint=ATOMIC, resume=True)
    assert len(again[1]) == 4
    assert newest(run)[0] == 'epoch_4.pth'


def test_other_names_and_another_folder(tmp_path):
    options = ATOMIC | dict(filename_tmpl='model-{}.pt', out_dir=str(tmp_path / 'store'))
    train(tmp_path / 'run', True, 0, 2, checkpoint=options)
    (tmp_path / 'run' / 'last_checkpoint').unlink()
    place = dict(folder=str(tmp_path / 'store' / 'run'), template='model-{}.pt')
    assert newest(tmp_path / 'run', **place)[0] == 'model-2.pt'
    (tmp_path / 'store' / 'run' / 'model-2.pt').write_bytes(b'PK')
    assert len(train(tmp_path / 'run', True, 0, 3, checkpoint=options, resume=True)[1]) == 8


def test_all_checkpoints_gone(run, tmp_path):
    for path in run.glob('*.pth'):
        path.unlink()
    with pytest.raises(CheckpointError, match=r'none of them is there any more.*--resume PATH'):
        find_newest(run)
    (tmp_path / 'moved').mkdir()
    (tmp_path / 'moved' / 'last_checkpoint').write_text('/scratch/epoch_3.pth')
    with pytest.raises(CheckpointError, match=r'/scratch/epoch_3.pth.*no other checkpoint.*--resume PATH'):
        find_newest(tmp_path / 'moved')
    (tmp_path / 'moved' / 'epoch_3.pth').mkdir()  # DeepSpeed's format
    assert find_newest(tmp_path / 'moved')[0] == str(tmp_path / 'moved' / 'epoch_3.pth')


# --- restarts


def test_a_restarted_run_goes_on_or_stops(run, monkeypatch):
    """Known by the id of its launcher: without --resume, and before its first checkpoint as the command line says."""
    monkeypatch.setenv(LAUNCH, 'first')
    with pytest.raises(KeyboardInterrupt):
        train(run, True, 0, 3, checkpoint=ATOMIC, hooks=('StopAtOnce',))
    assert len(train(run, True, 0, 2, checkpoint=ATOMIC)[1]) == 8  # nothing was saved: from the beginning
    assert len(train(run, True, 0, 3, checkpoint=ATOMIC)[1]) == 4
    for path in run.glob('epoch_*.pth'):
        path.write_bytes(b'PK')
    with pytest.raises(CheckpointError, match=r'no intact checkpoint to resume from'):
        train(run, True, 0, 3, checkpoint=ATOMIC)
    monkeypatch.setenv(LAUNCH, 'second')  # a new start
    assert len(train(run, True, 0, 1, checkpoint=ATOMIC)[1]) == 4


def test_plain_torchrun_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    assert len(train(tmp_path, True, 0, 1, checkpoint=ATOMIC)[1]) == 4
    assert len(train(tmp_path, True, 0, 1, checkpoint=ATOMIC)[1]) == 4  # another start
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert len(train(tmp_path, True, 0, 2, checkpoint=ATOMIC)[1]) == 4


# --- several processes


def resume_from_own_disk(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    run = Run(str(folder / f'disk{rank}'), str(folder / f'disk{rank}'), 'epoch_{}.pth')
    try:
        run.begin(True, None)
    except CheckpointError as error:
        finish(str(error), rank, folder)
    finish('began', rank, folder)


def test_machines_with_disks_of_their_own(run, tmp_path):
    """Both hold an epoch_3.pth of the same iteration, of two runs."""
    run.rename(tmp_path / 'disk0')
    shutil.copytree(tmp_path / 'disk0', tmp_path / 'disk1')
    change(tmp_path / 'disk1' / 'epoch_3.pth', {RUN_ID: 32 * 'b'})
    for message in run_two(resume_from_own_disk, tmp_path):
        assert 'must be the same folder on all machines' in message
        assert run_id(tmp_path / 'disk0' / 'epoch_3.pth') in message
        assert 32 * 'b' in message


# --- one training in a folder


def test_a_second_training_in_a_folder_is_refused(tmp_path):
    """Until the first one ends, even if it is killed."""
    code = 'import sys, time; from vheat_mm.checkpoint.run_folder import lock; lock(__import__("pathlib").Path('
    code += 'sys.argv[1])); print("locked", flush=True); time.sleep(60)'
    command = [sys.executable, '-W', 'ignore', '-c', code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == 'locked\n'
        with pytest.raises(ToolError, match=rf'in use by process {first.pid} on .*--work-dir'):
            lock(tmp_path)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert lock(tmp_path) == lock(tmp_path) == []
    release(tmp_path)


def test_temporary_files_of_others_stay(run):
    parts = [run / name for name in ('.epoch_2.pth.abcdefgh.part', '.notes.txt.abcdefgh.part')]
    for part in parts:
        part.write_text('')
    train(run, True, 0, 3, checkpoint=ATOMIC, resume=True)
    assert [part.exists() for part in parts] == [False, True]


# --- what a checkpoint says


def test_paths_in_a_checkpoint_are_not_believed(run, tmp_path):
    """Neither a folder nor a file that no run of this folder wrote is removed."""
    best = ATOMIC | dict(save_best='score', rule='greater', max_keep_ckpts=1)
    for name in ('thesis', 'mine'):
        (tmp_path / name).mkdir()
    (tmp_path / 'mine' / 'epoch_8.pth').write_text('another file with a usual name')
    ids = ['../x', 8, 8, 7]
    change(run / 'epoch_3.pth', best_ckpt=str(tmp_path / 'thesis'), best_score='high', keep_ckpt_ids=ids)
    start = str(run / 'epoch_3.pth')
    train(tmp_path / 'mine', True, 0, 4, checkpoint=best, validate=1, resume=start)
    names = sorted(path.name for path in (tmp_path / 'mine').glob('*.pth'))
    assert names == ['best_score_epoch_4.pth', 'epoch_4.pth', 'epoch_8.pth']
    assert (tmp_path / 'thesis').is_dir()


CODE = 'from os import system\nmodel = system("exit 1")'


@pytest.mark.parametrize('key', ['config', 'cfg'])
def test_text_in_a_checkpoint_is_not_executed(run, key, monkeypatch):
    """``Runner.resume`` and the inferencers execute it."""
    change(run / 'epoch_3.pth', {key: CODE}, cfg=CODE)
    ran = []
    monkeypatch.setattr(os, 'system', ran.append)
    assert len(train(run, True, 0, 4, checkpoint=ATOMIC, resume=True)[1]) == 4
    assert not ran
    assert CODE not in str(MessageHub.get_current_instance().runtime_info.get('cfg'))
    for loader in (CheckpointLoader.load_checkpoint, fileio.load_from_local):
        checkpoint = loader(str(run / 'epoch_3.pth'))
        assert not {'config', 'cfg'} & checkpoint['meta'].keys()
        assert 'cfg' not in checkpoint['message_hub']['runtime_info']
