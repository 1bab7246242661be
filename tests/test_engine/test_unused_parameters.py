"""Outputs that no head reads, in two processes."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from processes import finish, join, run_two
from torch import nn
from torch.utils.data import Dataset

from vheat_mm import VHeat
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()  # MMEngine reports its version

WRAPPER = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)


@DATASETS.register_module()
class Pictures(Dataset):
    metainfo: dict = {}  # noqa: RUF012

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(image=torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)))


@MODELS.register_module()
class LastOutputOnly(BaseModel):
    def __init__(self, spare):
        super().__init__()
        self.backbone = VHeat(arch=dict(embed_dims=4, depths=(1, 1, 1, 1)), img_size=32, out_indices=(1, 3))
        self.head = nn.Sequential(nn.BatchNorm2d(32), nn.Dropout(0.5), nn.Conv2d(32, 1, 1))
        self.spare = nn.Linear(2, 2) if spare else nn.Identity()

    def forward(self, image, mode='tensor'):
        return dict(loss=self.head(self.backbone(torch.stack(list(image)))[-1]).square().mean())


def train(rank: int, port: int, folder: Path, spare: bool, find_unused: bool) -> None:
    join(rank, port)
    Runner._log_env = lambda *_: None  # runs compilers to get their versions
    runner = Runner(
        model=dict(type='LastOutputOnly', spare=spare),
        work_dir=str(folder / f'{rank}'),
        train_dataloader=dict(
            batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(type='Pictures')
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1)),
        custom_hooks=[dict(type='UnusedParametersHook')],
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(WRAPPER, find_unused_parameters=find_unused)),
        randomness=dict(seed=3),
        default_hooks=dict(checkpoint=None, logger=None),
        log_level='ERROR',
    )
    try:
        with mock.patch('mmengine.runner.loops.time'):  # MMEngine sleeps two seconds at the end of an epoch
            runner.train()
    except ToolError as error:
        finish(str(error), rank, folder)
    frozen = [name for name, p in runner.model.module.named_parameters() if not p.requires_grad]
    finish((frozen, runner.model.module.state_dict()), rank, folder)


def test_output_norms_that_no_head_reads_are_frozen(tmp_path):
    """The same results as where DistributedDataParallel looks for them: dropout and BatchNorm are as before."""
    results = run_two(train, tmp_path, False, False)
    expected = run_two(train, tmp_path, False, True)
    for (frozen, state), (none, reference) in zip(results, expected, strict=True):
        assert frozen == ['backbone.outnorm1.weight', 'backbone.outnorm1.bias']
        assert none == []
        torch.testing.assert_close(state, reference)
        assert int(state['head.0.num_batches_tracked']) == 2


def test_other_parameters_without_gradient_are_named(tmp_path):
    message, other = run_two(train, tmp_path, True, False)
    assert message == other
    assert message.startswith('2 parameters get no gradient')
    assert 'spare.weight, spare.bias' in message
    assert 'find_unused_parameters=True' in message
