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
from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader
from processes import finish, join, run_two
from small_runs import train

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.resume import RUN_ID, find_newest
from vheat_mm.checkpoint.run import LAUNCH, Run
from vheat_mm.checkpoint.run_folder import lock, read_small, release
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


def test_a_run_falls_back_to_the_checkpoint_that_it_began_from(run, tmp_path, capfd):
    """In another folder, before its first save and if its own checkpoints are corrupt; nothing of that is warned of."""
    options, start = ATOMIC | dict(save_best='score', rule='greater'), run / 'epoch_2.pth'
    change(start, best_ckpt=str(run / 'best_score_epoch_1.pth'), best_score=0.0)
    log = dict(change=lambda settings: settings.update(log_level='WARNING'), hooks=('StopAtOnce',))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / 'new', True, 0, 3, checkpoint=options, validate=9, resume=str(start), **log)
    assert 'epoch_' not in ''.join(line for line in capfd.readouterr().out.splitlines() if 'WARNING' in line)
    assert len(train(tmp_path / 'new', True, 0, 3, checkpoint=ATOMIC, resume=True)[1]) == 4
    (tmp_path / 'new' / 'epoch_3.pth').write_bytes(b'PK')
    path, notes = find_newest(tmp_path / 'new')
    assert path == str(start)
    assert ['epoch_3.pth' in note for note in notes] == [True]
    (tmp_path / 'new' / 'epoch_3.pth').unlink()
    change(start, dict(iter=7))  # it is not the same file any more
    with pytest.raises(CheckpointError, match='saved checkpoints there'):
        find_newest(tmp_path / 'new')


def test_a_renamed_checkpoint_of_the_run_counts(run):
    (run / 'epoch_3.pth').rename(run / 'good.pth')
    assert newest(run)[0] == 'good.pth'
    (run / 'run.json').unlink()  # then nothing says that it is the run's
    assert newest(run)[0] == 'epoch_2.pth'


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
    name, notes = newest(run)
    assert name == 'epoch_3.pth'
    assert 'has saved nothing' in notes


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


class Storage(LocalBackend):
    """A remote storage; the folder is that of ``Storage.root``."""

    root = Path()

    def _local(self, path):
        return str(path).replace('storage:/', str(self.root))

    def get(self, filepath):
        return super().get(self._local(filepath))

    def put(self, obj, filepath):
        super().put(obj, self._local(filepath))

    def isfile(self, filepath):
        return super().isfile(self._local(filepath))

    def remove(self, filepath):
        super().remove(self._local(filepath))


register_backend('storage', Storage, prefixes='storage')
FileClient.register_backend('storage', Storage, prefixes='storage')  # MMEngine's hook asks it, too


@CheckpointLoader.register_scheme(prefixes='storage:/')
def load_from_storage(filename, map_location=None):
    return read_checkpoint(Storage()._local(filename))


def test_a_remote_folder(run, tmp_path, monkeypatch):
    """The run goes on from the file that ``last_checkpoint`` names, and removes what it wrote before."""
    monkeypatch.setattr(Storage, 'root', tmp_path)
    options = ATOMIC | dict(out_dir='storage://store', max_keep_ckpts=1)
    for length in (2, 3):
        assert len(train(tmp_path / 'work', True, 0, length, checkpoint=options, resume=True)[1]) == 16 - 4 * length
        assert [path.name for path in (tmp_path / 'store').rglob('*.pth')] == [f'epoch_{length}.pth']
    shutil.copy(run / 'epoch_1.pth', tmp_path / 'store' / 'work')
    (tmp_path / 'store' / 'work' / 'epoch_8.pth').write_text('of somebody else')
    change(tmp_path / 'store' / 'work' / 'epoch_1.pth', keep_ckpt_ids=[8])
    other = 'storage://store/work/epoch_1.pth'
    train(tmp_path / 'work', True, 0, 3, checkpoint=options, resume=other)
    names = sorted(path.name for path in (tmp_path / 'store').rglob('*.pth'))
    assert names == ['epoch_1.pth', 'epoch_3.pth', 'epoch_8.pth']


def test_all_checkpoints_gone(run, tmp_path):
    for path in run.glob('*.pth'):
        path.unlink()
    with pytest.raises(CheckpointError, match=r'no checkpoint .* saved checkpoints there.*--resume PATH'):
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
    for name in ('mine.pth', 'epoch_8.pth'):  # a checkpoint of the folder's own run names them
        shutil.copy(run / 'epoch_1.pth', run / name)
        change(run / name, {RUN_ID: 32 * 'a'})
    change(run / 'epoch_3.pth', best_ckpt=str(run / 'mine.pth'), best_score=-1.0, keep_ckpt_ids=[8])
    train(run, True, 0, 4, checkpoint=best, validate=1, resume=True)
    assert {'mine.pth', 'epoch_8.pth', 'best_score_epoch_4.pth'} <= {path.name for path in run.glob('*.pth')}


@pytest.mark.parametrize(
    ('place', 'value'),
    [
        ('meta.iter', -1),
        ('meta.epoch', '2'),
        ('meta.seed', 1 << 70),
        ('message_hub', []),
        ('param_schedulers.0.step', 3),
        ('param_schedulers.0.last_step', 'x'),
        ('param_schedulers', {'a': []}),
        ('optimizer.param_groups.0.lr', 'fast'),
        ('optimizer.state.0.exp_avg', torch.zeros(5)),
    ],
)
def test_training_state_of_wrong_types(run, place, value):
    part = checkpoint = read_checkpoint(run / 'epoch_3.pth')
    *way, last = place.split('.')
    for key in way:
        part = part[int(key) if key.isdigit() else key]
    part[last] = value
    torch.save(checkpoint, run / 'odd.pth')
    with pytest.raises(CheckpointError, match=rf'cannot resume from .*odd.pth.*{last}'):
        train(run, True, 0, 4, checkpoint=ATOMIC, resume=str(run / 'odd.pth'))


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


def test_only_small_files_of_the_folder_are_read(tmp_path):
    file, link = tmp_path / 'run.json', tmp_path / 'link'
    file.write_bytes(b'text')
    link.symlink_to(file)
    assert [read_small(path) for path in (file, link, tmp_path / 'none')] == [b'text', None, None]
    with file.open('r+b') as stream:
        stream.truncate((1 << 20) + 1)
    assert read_small(file) is None
