"""A short training of a very small model on random numbers, for the tests of hooks."""

from __future__ import annotations

import itertools
import os
import signal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()  # MMEngine's runner imports it to report its version


@DATASETS.register_module()
class NoisyNumbers(Dataset):
    """Samples of (index, numpy noise, torch noise); the noise stands for augmentation."""

    metainfo: dict = {}  # noqa: RUF012

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(index=torch.tensor(float(index)), a=torch.tensor(np.random.rand()), b=torch.rand(()))  # noqa: NPY002


@MODELS.register_module()
class DropoutLine(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, index, a, b, mode='tensor'):
        inputs = torch.stack([torch.stack(list(x)) for x in (index, a, b)], dim=1).float()
        outputs = self.layers(inputs)
        return dict(loss=outputs.square().mean()) if mode == 'loss' else list(outputs)


@HOOKS.register_module()
class RecordBatches(Hook):
    """Records the batches."""

    batches: list = []  # noqa: RUF012

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches.append(torch.stack([torch.stack(list(data_batch[key])) for key in ('index', 'a', 'b')]))


@HOOKS.register_module()
class DrawNumbers(Hook):
    """Draws random numbers, as a hook that picks images to log."""

    def __init__(self, count):
        self.count = count

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        torch.rand(self.count)


@HOOKS.register_module()
class SignalItself(Hook):
    """Sends this process a signal after an iteration or in a validation."""

    def __init__(self, after=None, in_validation=None, number=signal.SIGTERM):
        self.after, self.in_validation, self.number = after, in_validation, number

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            os.kill(os.getpid(), self.number)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.in_validation:
            os.kill(os.getpid(), self.number)


@METRICS.register_module()
class CountedScore(BaseMetric):
    """A score that increases with each validation; counts them."""

    runs: int = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        type(self).runs += 1
        return dict(score=float(self.runs))


@OPTIM_WRAPPERS.register_module()
class CPUScaledOptimWrapper(AmpOptimWrapper):
    """``AmpOptimWrapper`` cannot be built without a GPU; its loss scaler works on the CPU, too."""

    def __init__(self, init_scale=1024.0, dynamic=True, use_fsdp=False, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)
        self._scale_update_param = None if dynamic else init_scale

    optim_context = OptimWrapper.optim_context


DISTRIBUTED = dict(
    launcher='pytorch',
    cfg=dict(
        model_wrapper_cfg=dict(
            type='MMDistributedDataParallel', find_unused_parameters=False, broadcast_buffers=False, device_ids=None
        )
    ),
)
ALL_HOOKS = ('StopSignalHook', 'NonFiniteGuardHook', 'SkipBrokenSamplesHook', 'ReproducibleHook')


def train(
    work_dir,
    by_epoch,
    workers,
    length,
    hooks=('ReproducibleHook',),
    resume=None,
    sampler='DefaultSampler',
    drawn=0,
    checkpoint=None,
    accumulate=1,
    validate=0,
    send=None,
    persistent=False,
    ema=False,
    logged=10,
    seed=5,
    early=None,
    change=None,
):
    """Train for ``length`` iterations of 2 samples, or epochs of 4 iterations; returns weights and batches.

    Args:
        resume: A checkpoint, or True for the newest one.
        drawn: How many numbers another hook draws after each iteration.
        checkpoint: Changes of the checkpoint hook's config.
        validate: Interval, 0 for never.
        send: Arguments of SignalItself.
        early: Arguments of EarlyStoppingHook.
        change: Called with the arguments of the runner.
    """
    RecordBatches.batches = []
    loop = dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length)
    loader = dict(batch_size=2, num_workers=workers, persistent_workers=persistent, dataset=dict(type='NoisyNumbers'))
    validation = dict(
        val_dataloader=dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=dict(type='CountedScore'),
    )
    hook = dict(type='CheckpointHook', interval=1 if by_epoch else 3, by_epoch=by_epoch)
    with mock.patch.object(Runner, '_log_env'):  # runs compilers to get their versions
        settings = dict(
            model=dict(type='DropoutLine'),
            work_dir=str(work_dir),
            train_dataloader=dict(**loader, sampler=dict(type=sampler, shuffle=True)),
            train_cfg=dict(**loop, val_interval=validate or 10**6, val_begin=validate or 10**6),
            **(validation if validate else {}),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=accumulate),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.2, by_epoch=False, end=5),
                dict(type='ExponentialLR', gamma=0.8, by_epoch=by_epoch),
            ],
            default_hooks=dict(checkpoint=hook | (checkpoint or {}), logger=dict(type='LoggerHook', interval=logged)),
            custom_hooks=[
                dict(type='RecordBatches'),
                dict(type='DrawNumbers', count=drawn),
                *([dict(type='EMAHook', momentum=0.3)] if ema else []),
                *(dict(type=name) for name in hooks),
                *([dict(type='SignalItself', **send)] if send else []),
                *([dict(type='EarlyStoppingHook', **early)] if early else []),
            ],
            randomness=dict(seed=seed),
            resume=resume is not None,
            **(DISTRIBUTED if dist.is_initialized() else {}),
            load_from=resume if isinstance(resume, str) else None,
            log_level='ERROR',
            experiment_name=f'{next(_counter)}',  # MMEngine keeps loggers by name
        )
        if change is not None:
            change(settings)
        runner = Runner(**settings)
    # Workers are ended explicitly: the garbage collector would wait for them later.
    try:
        with mock.patch('mmengine.runner.loops.time'):  # MMEngine sleeps two seconds at the end of each pass
            runner.train()
    except SystemExit as stop:
        raise stop.with_traceback(None) from None  # its frames hold iterators
    finally:
        if not by_epoch:
            runner.train_loop.dataloader_iterator = None
        if iterator := runner.train_dataloader._iterator:
            iterator._shutdown_workers()
    return torch.cat([p.detach().flatten() for p in runner.model.parameters()]), RecordBatches.batches


_counter = itertools.count()
