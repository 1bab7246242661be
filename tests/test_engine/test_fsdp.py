"""FSDP on two processes without a GPU gives the weights of one process, resumed or not."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import FlexibleRunner, Runner
from mmengine.structures import BaseDataElement
from processes import finish, join, run_two
from small_runs import CPUScaledOptimWrapper
from torch import nn
from torch.utils.data import Dataset

from vheat_mm import VHeat
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.engine.strategies.fsdp import FSDP, ShardedStrategy
from vheat_mm.utils.errors import StopRequested

register_safe_globals()
TINY = dict(arch=dict(embed_dims=4, depths=(1, 1, 2, 1)), img_size=64)


@DATASETS.register_module()
class RandomPictures(Dataset):
    """Picture ``i`` depends on i alone; ``broken``: pictures with a non-finite pixel, and a non-finite gradient."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, broken=(-1, -1)):
        self.broken = broken

    def __len__(self):
        return 16

    def __getitem__(self, index):
        picture = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        if index == self.broken[0]:
            picture[0, 0, 0] = float('nan')
        meta = dict(img_path=f'{index}.png', gradient=index == self.broken[1])
        return dict(inputs=picture, sample=BaseDataElement(metainfo=meta), label=index % 3)


@MODELS.register_module()
class TinyClassifier(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = VHeat(**TINY, out_indices=(3,))
        self.head = nn.Linear(32, 3)

    def forward(self, inputs, sample, label, mode='tensor'):
        features = self.backbone(torch.stack(list(inputs)))[0].mean((2, 3))
        loss = nn.functional.cross_entropy(self.head(features), torch.tensor(label))
        if any(s.gradient for s in sample):  # of one bias alone, which one process holds
            loss = loss + (self.head.bias * 0).square().sum().sqrt()
        return dict(loss=loss)


def config(work_dir, batch_size, epochs=2, broken=(-1, -1), **kwargs):
    return (
        dict(
            model=dict(type='TinyClassifier'),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=batch_size,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(type='RandomPictures', broken=broken),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), paramwise_cfg=dict(norm_decay_mult=0.0)
            ),
            param_scheduler=dict(type='LinearLR', by_epoch=False, start_factor=0.5, begin=0, end=8),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='NonFiniteGuardHook', patience=2)],
            randomness=dict(seed=1),
            log_level='WARNING',
            experiment_name=re.sub(r'\W', '-', str(work_dir)),
        )
        | kwargs
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_sharded(work_dir, scale=1024.0, **kwargs):
    settings = config(work_dir, 2, strategy=dict(type='ShardedStrategy'), launcher='pytorch', **kwargs)
    if scale:
        settings['optim_wrapper'] |= dict(type=CPUScaledOptimWrapper, init_scale=scale)
    runner = FlexibleRunner(**settings)
    runner.train()
    units = sum(isinstance(module, FSDP) for module in runner.model.modules())
    own = sum(parameter.numel() for parameter in runner.model.parameters())
    with FSDP.summon_full_params(runner.model):
        scale = runner.optim_wrapper.loss_scaler.get_scale() if scale else None
        return dict(weights=weights(runner.model), units=units, own=own, scale=scale)


def in_process(rank, port, folder):
    join(rank, port)
    results = dict(full=train_sharded(folder / 'full'))
    start = dict(resume=True, load_from=str(folder / 'full' / 'epoch_1.pth'))
    results['resumed'] = train_sharded(folder / 'resumed', scale=2.0, **start)
    hooks = [dict(type='ReproducibleHook'), dict(type='StopSignalHook')]
    stop = dict(scale=None, default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook')))
    results['whole'] = train_sharded(folder / 'whole', custom_hooks=hooks, **stop)
    send = [dict(type='SignalItself', after=2 if rank else None)]
    with pytest.raises(StopRequested):
        train_sharded(folder / 'stopped', custom_hooks=hooks + send, **stop)
    newest = dict(resume=True, load_from=str(folder / 'stopped' / 'interrupted.pth'))
    stop['experiment_name'] = 'again'
    results['continued'] = train_sharded(folder / 'stopped', custom_hooks=hooks, **stop, **newest)
    results['broken'] = train_sharded(folder / 'broken', scale=None, broken=(5, 12), epochs=1)
    finish(results, rank, folder)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fsdp')
    return folder, run_two(in_process, folder)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance)


def test_the_weights_are_those_of_one_process(two_processes, tmp_path):
    """Each process holds half of them; the units are the stages and the whole model."""
    _, results = two_processes
    runner = Runner(**config(tmp_path, 4))
    before = weights(runner.model)
    runner.train()
    expected = weights(runner.model)
    moved = max((expected[name] - before[name]).abs().max().item() for name in expected)
    assert moved > 5e-3
    total = sum(value.numel() for value in expected.values())
    for own in results:
        assert_close(own['full']['weights'], expected, 2e-4)
        assert own['full']['units'] == 5
        assert abs(own['full']['own'] - total / 2) < 0.01 * total


def test_resumed_training_equals_uninterrupted(two_processes):
    _, results = two_processes
    for own in results:
        assert_close(own['resumed']['weights'], own['full']['weights'], 0)
        assert own['resumed']['scale'] == 1024  # not the initial scale 2


def test_interrupted_within_an_epoch(two_processes):
    folder, results = two_processes
    for own in results:
        assert_close(own['continued']['weights'], own['whole']['weights'], 0)
    last = read_checkpoint(folder / 'stopped' / 'epoch_2.pth')['meta']
    assert (last['epoch'], last['iter']) == (2, 8)


def test_checkpoints_hold_full_weights(two_processes):
    """The safe loader reads them."""
    folder, results = two_processes
    checkpoint = read_checkpoint(folder / 'full' / 'epoch_2.pth')
    assert_close(checkpoint['state_dict'], TinyClassifier().state_dict() | results[0]['full']['weights'], 0)
    assert len(checkpoint['optimizer']['state']) == len(results[0]['full']['weights'])


def test_a_step_is_skipped_in_both_processes(two_processes):
    """Also if the gradients of only one process are not finite."""
    folder, results = two_processes
    lines = [line for file in (folder / 'broken').glob('*/*.log') for line in file.read_text().splitlines()]
    lines = [line for line in lines if 'finite' in line]
    assert len(lines) == 2
    assert 'iteration 2: loss is not finite, process 1: loss=nan from 5.png, 7.png;' in lines[0]
    assert 'iteration 4: gradient is not finite, process 0: from 12.png, 14.png; process 1: from 13' in lines[1]
    assert lines[1].endswith('step skipped, 2 so far, 1 in a row')
    assert_close(results[0]['broken']['weights'], results[1]['broken']['weights'], 0)
    assert all(value.isfinite().all() for value in results[0]['broken']['weights'].values())


@pytest.mark.parametrize(
    'kwargs', [dict(state_dict_cfg='local'), dict(model_wrapper=dict(use_orig_params=False))], ids=str
)
def test_unsupported_options_are_refused(kwargs):
    with pytest.raises(ValueError, match='ShardedStrategy'):
        ShardedStrategy(**kwargs)
