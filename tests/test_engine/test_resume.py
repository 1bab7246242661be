"""Resuming: validations that were cut short, early stopping, changed settings, and state that no checkpoint holds."""

import collections
import pathlib

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OneCycleLR  # noqa: F401 (registered)
from mmengine.registry import HOOKS
from small_runs import ALL_HOOKS, CountedScore, DropoutLine, NoisyNumbers, RecordBatches, train

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.engine.runner.stateful_parts import changing_attributes
from vheat_mm.utils.errors import CheckpointError, StopRequested

ATOMIC = dict(type='AtomicCheckpointHook')
BEST = ATOMIC | dict(save_best='score', rule='greater', max_keep_ckpts=1)
SCORES = [0.5, 0.9, 0.7, 0.6, 0.4, 0.3]
LOOPS = [pytest.param(True, 4, 1, 'DefaultSampler'), pytest.param(False, 16, 4, 'InfiniteSampler')]


@pytest.fixture
def scores(monkeypatch):
    """Validations give ``SCORES`` by the iteration; ``scores[0]``: where to end the process."""
    state = collections.defaultdict(int)

    def score(metric, results):
        assert state['iteration'] != state['killed'], 'killed'
        state['validations'] += 1
        found = SCORES[state['iteration'] // 4 - 1]
        return dict(score=found, other=-found)

    def note(hook, runner):
        state['iteration'] = runner.iter

    monkeypatch.setattr(CountedScore, 'compute_metrics', score)
    monkeypatch.setattr(RecordBatches, 'before_val', note, raising=False)
    return state


@pytest.mark.parametrize(('by_epoch', 'length', 'interval', 'sampler'), LOOPS)
@pytest.mark.parametrize('killed', [8, 16])
def test_a_validation_cut_short_is_run_after_resuming(tmp_path, scores, by_epoch, length, interval, sampler, killed):
    checkpoint = BEST | dict(interval=1 if by_epoch else 4, max_keep_ckpts=-1 if killed == 8 else 1)
    options = dict(hooks=ALL_HOOKS, checkpoint=checkpoint, validate=interval, sampler=sampler)
    train(tmp_path / 'full', by_epoch, 0, length, **options)
    scores['killed'] = killed
    with pytest.raises(AssertionError, match='killed'):
        train(tmp_path / 'again', by_epoch, 0, length, **options)
    scores['killed'] = 0
    train(tmp_path / 'again', by_epoch, 0, length, **options, resume=True)
    assert len(RecordBatches.batches) == 16 - killed
    names = [sorted(path.name for path in (tmp_path / name).glob('*.pth')) for name in ('full', 'again')]
    assert names[0] == names[1]
    assert len([name for name in names[0] if 'best' in name]) == 1
    if killed == 8:  # the resumed file is written again, with the new best score
        for name in ('epoch_2.pth' if by_epoch else 'iter_8.pth', names[0][-1]):
            assert read_checkpoint(tmp_path / 'again' / name)['message_hub']['runtime_info']['best_score'] == 0.9
    validations = scores['validations']
    train(tmp_path / 'again', by_epoch, 0, length, **options, resume=True)
    assert scores['validations'] == validations  # a finished training is not validated again
    options['validate'] *= 2
    train(tmp_path / 'again', by_epoch, 0, length * 3 // 2, **options, resume=True)
    assert scores['validations'] == validations + 2


def test_patience_survives(tmp_path, scores, monkeypatch):
    """It ends after two validations without a better score, interrupted between them or not, and is then saved."""
    early = dict(monitor='score', rule='greater', patience=2, min_delta=0)
    options = dict(hooks=ALL_HOOKS, checkpoint=BEST | dict(interval=100), validate=1, early=early)
    full = train(tmp_path / 'full', True, 0, 5, **options)
    assert len(full[1]) == 16
    with pytest.raises(StopRequested):
        train(tmp_path / 'again', True, 0, 5, **options, send=dict(after=14))
    again = train(tmp_path / 'again', True, 0, 5, **options, resume=True)
    assert len(again[1]) == 2
    torch.testing.assert_close(again[0], full[0], rtol=0, atol=0)
    assert (tmp_path / 'again' / 'epoch_4.pth').is_file()
    train(tmp_path / 'again', True, 0, 5, **options, resume=True)
    assert not RecordBatches.batches
    options['early'] = early | dict(patience=3)
    train(tmp_path / 'again', True, 0, 5, **options, resume=True)
    assert len(RecordBatches.batches) == 4


def set_loop(settings):
    settings['train_cfg'] = dict(by_epoch=False, max_iters=20)


def optimizer(**kwargs):
    return lambda settings: settings['optim_wrapper'].update(optimizer=kwargs)


def schedulers(*configs):
    return lambda settings: settings.update(param_scheduler=[*configs])


CHANGES = {
    'batch size': (
        lambda settings: settings['train_dataloader'].update(batch_size=4), 'batch_size 2 -> 4: training continues', 3
    ),
    'order': (
        lambda settings: settings['train_dataloader']['sampler'].update(shuffle=False), '(shuffle=True) -> Default', 6
    ),
    'accumulation': (
        lambda settings: settings['optim_wrapper'].update(accumulative_counts=3), 'accumulative_counts 1 -> 3:', 6
    ),
    'average': (lambda settings: settings['custom_hooks'].append(dict(type='EMAHook')), 'EMAHook False -> True:', 6),
    'learning rate': (optimizer(type='AdamW', lr=0.01), 'optimizer: lr 0.1 -> 0.01: the value of the config is NOT', 6),
    'no schedulers': (schedulers(), 'LinearLR, ExponentialLR -> none: the learning rate stays', 6),
    'shorter': (lambda settings: settings['train_cfg'].update(max_epochs=1), '3 -> 1: 1 are done, nothing is left', 0),
    'seed': (lambda settings: settings.update(randomness=dict(seed=9)), 'seed of the interrupted run is used: 5', 6),
    'loop': (set_loop, 'kind of loop by epoch -> by iteration', None),
    'optimizer': (optimizer(type='SGD', lr=0.1, momentum=0.9), 'optimizer AdamW -> SGD', None),
    'schedulers': (schedulers(dict(type='CosineAnnealingLR', T_max=3)), 'ExponentialLR -> CosineAnnealingLR', None),
}  # fmt: skip


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('interrupted')
    with pytest.raises(StopRequested):
        train(folder, True, 0, 3, hooks=ALL_HOOKS, checkpoint=ATOMIC, send=dict(after=6))
    return str(folder / 'interrupted.pth')


@pytest.mark.parametrize('name', CHANGES)
def test_changed_settings(tmp_path, interrupted, name):
    """Each has one line that says what follows, or an error with the option that starts anew."""
    change, message, batches = CHANGES[name]

    def changed(settings):
        settings['log_level'] = 'INFO'
        change(settings)

    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, resume=interrupted, change=changed)
    if batches is None:
        with pytest.raises(CheckpointError, match=f'{message}.*load_from'):
            train(tmp_path, True, 0, 3, **options)
        return
    train(tmp_path, True, 0, 3, **options)
    assert len(RecordBatches.batches) == batches
    (log,) = tmp_path.glob('*/*.log')
    assert len([line for line in log.read_text().splitlines() if message in line]) == 1


def test_another_best_score(tmp_path, scores, capfd):
    """It is not compared with the best of the score before."""
    options = dict(hooks=ALL_HOOKS, validate=1, change=lambda settings: settings.update(log_level='WARNING'))
    train(tmp_path, True, 0, 2, **options, checkpoint=BEST)
    train(tmp_path, True, 0, 3, **options, checkpoint=BEST | dict(save_best='other'), resume=True)
    assert {path.name for path in tmp_path.glob('best*')} == {'best_score_epoch_2.pth', 'best_other_epoch_3.pth'}
    assert capfd.readouterr().out.count('save_best score -> other: the best checkpoint is chosen anew') == 1


def test_another_number_of_processes(tmp_path, interrupted, capfd):
    """One batch of each of two processes is as much of the epoch as two batches of one."""
    checkpoint = read_checkpoint(interrupted)
    checkpoint['meta']['vheat_settings']['number of processes'] = 2
    checkpoint['meta']['vheat_batches_done'] = 1
    torch.save(checkpoint, tmp_path / 'two.pth')
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, resume=str(tmp_path / 'two.pth'))
    train(tmp_path, True, 0, 3, **options, change=lambda settings: settings.update(log_level='WARNING'))
    assert len(RecordBatches.batches) == 6
    assert capfd.readouterr().out.count('number of processes 2 -> 1: training continues at about the same part') == 1


ODD = [
    dict(vheat_settings='x', vheat_batches_done=1),
    dict(vheat_batches_done='1'),
    dict(vheat_batches_done=-2),
    dict(vheat_early_stopping=dict(stopped=True)),
    dict(vheat_early_stopping=3),
]


@pytest.mark.parametrize('meta', ODD, ids=str)
def test_odd_entries_are_an_error_of_the_checkpoint(tmp_path, interrupted, meta):
    checkpoint = read_checkpoint(interrupted)
    checkpoint['meta'].update(meta)
    torch.save(checkpoint, tmp_path / 'odd.pth')
    with pytest.raises(CheckpointError, match=r'odd.pth.*position or settings'):
        train(tmp_path, True, 0, 3, hooks=ALL_HOOKS, checkpoint=ATOMIC, resume=str(tmp_path / 'odd.pth'))


def test_checkpoints_of_the_version_before(tmp_path, interrupted):
    """They hold neither settings nor what is validated."""
    checkpoint = read_checkpoint(interrupted)
    for key in ('vheat_settings', 'vheat_validated', 'vheat_early_stopping'):
        del checkpoint['meta'][key]
    torch.save(checkpoint, tmp_path / 'old.pth')
    train(tmp_path, True, 0, 3, hooks=ALL_HOOKS, checkpoint=ATOMIC, resume=str(tmp_path / 'old.pth'))
    assert len(RecordBatches.batches) == 6


def test_a_changed_batch_size_by_iteration(tmp_path):
    """The position in the data is kept, also by later checkpoints: nothing is trained twice in this pass."""
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, sampler='InfiniteSampler')
    with pytest.raises(StopRequested):
        train(tmp_path, False, 0, 4, **options, send=dict(after=2))
    seen = torch.cat([batch[0] for batch in RecordBatches.batches])
    for after in (3, 4):
        with pytest.raises(StopRequested):
            train(
                tmp_path, False, 0, 9, **options, resume=True, send=dict(after=after),
                change=lambda settings: settings['train_dataloader'].update(batch_size=1),
            )  # fmt: skip
        seen = torch.cat([seen, *(batch[0] for batch in RecordBatches.batches)])
    assert len(set(seen.tolist())) == len(seen) == 6


def test_one_cycle_resumes(tmp_path):
    def one_cycle(settings):
        settings['param_scheduler'] = [dict(type='OneCycleLR', eta_max=0.1, total_steps=12, by_epoch=False)]

    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, change=one_cycle)
    full = train(tmp_path / 'full', True, 0, 3, **options)
    again = train(tmp_path / 'again', True, 0, 3, **options, resume=str(tmp_path / 'full' / 'epoch_2.pth'))
    torch.testing.assert_close(again[0], full[0], rtol=0, atol=0)


def test_a_module_with_a_state_that_is_no_tensor(tmp_path, monkeypatch):
    restored = []
    monkeypatch.setattr(DropoutLine, 'get_extra_state', lambda self: dict(a=1), raising=False)
    monkeypatch.setattr(DropoutLine, 'set_extra_state', lambda self, state: restored.append(state), raising=False)
    options = dict(hooks=[*ALL_HOOKS, 'CheckpointCheckHook'], checkpoint=ATOMIC)
    train(tmp_path, True, 0, 1, **options)
    train(tmp_path, True, 0, 2, **options, resume=True)
    assert restored == [dict(a=1)]


def test_metainfo_of_other_types(tmp_path, monkeypatch, capfd):
    """It is converted in the checkpoint; MMEngine would call it another data set."""
    monkeypatch.setattr(NoisyNumbers, 'metainfo', dict(classes=np.array(['a', 'b']), folder=pathlib.Path('a')))
    options = dict(hooks=ALL_HOOKS, checkpoint=ATOMIC, change=lambda settings: settings.update(log_level='WARNING'))
    train(tmp_path, True, 0, 1, **options)
    train(tmp_path, True, 0, 2, **options, resume=True)
    assert 'metainfo from the resumed checkpoint is different' not in capfd.readouterr().out


@HOOKS.register_module()
class StoresAFunction(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.message_hub.update_info('mine', print)


def test_what_cannot_be_read_again(tmp_path, monkeypatch, capfd):
    """Refused before the first iteration; what a hook adds later is left out, said once."""
    train(tmp_path / 'later', True, 0, 2, hooks=[*ALL_HOOKS, 'StoresAFunction'], checkpoint=ATOMIC)
    assert capfd.readouterr().out.count('message_hub.runtime_info.mine: a function') == 1
    assert 'mine' not in read_checkpoint(tmp_path / 'later' / 'epoch_2.pth')['message_hub']['runtime_info']
    monkeypatch.setattr(NoisyNumbers, 'metainfo', dict(palette=[0, print]))
    with pytest.raises(CheckpointError, match=r'meta.dataset_meta.palette\[1\]: a function'):
        train(tmp_path / 'first', True, 0, 2, hooks=ALL_HOOKS, checkpoint=ATOMIC)
    assert not RecordBatches.batches
    assert not list((tmp_path / 'first').glob('*.pth'))


class Cached:
    def __init__(self):
        self.cache, self.count, self.size = [], 0, 3

    def transform(self, results):
        self.cache.append(results)
        self.count += 1
        results['size'] = self.size
        return results


@HOOKS.register_module()
class Records(Hook):
    def before_run(self, runner):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        entry = dict(iteration=runner.iter)
        entry['loss'] = outputs['loss']
        self.losses.append(entry)


@HOOKS.register_module()
class Decays(Records):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['weight_decay'] = len(self.losses) / 100


def test_parts_with_a_state_are_named(tmp_path, capfd, monkeypatch):
    """Also a hook that changes the training, but not one that only records; and a choice of what is saved."""
    assert changing_attributes(Cached) == ['count', 'cache']
    monkeypatch.setattr(NoisyNumbers, 'pipeline', [Cached()], raising=False)
    options = dict(hooks=[*ALL_HOOKS, 'Records', 'Decays'], checkpoint=ATOMIC | dict(save_optimizer=False))
    train(tmp_path, True, 0, 1, **options, change=lambda settings: settings.update(log_level='WARNING'))
    log = capfd.readouterr().out
    assert 'which no checkpoint holds: Cached (count, cache), Decays (losses). After' in log
    assert log.count('no checkpoint of this run can be resumed') == 1


def test_transforms_of_the_libraries():
    """Two keep images of earlier samples; crops, flips and loading keep nothing."""
    transforms = pytest.importorskip('mmdet.datasets.transforms')
    kinds = [kind for kind in vars(transforms).values() if isinstance(kind, type)]
    assert {kind.__name__ for kind in kinds if changing_attributes(kind)} == {'CachedMixUp', 'CachedMosaic'}
    assert len(kinds) > 50
