"""A state that is not finite replaces no checkpoint."""

from __future__ import annotations

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from small_runs import CPUScaledOptimWrapper
from test_non_finite_guard import NormedLine, log_of, make_runner
from torch import nn

from vheat_mm.engine.finite_state import named_state
from vheat_mm.utils.errors import NonFiniteError

INF = float('inf')


@HOOKS.register_module()
class Damage(Hook):
    """Makes one value infinite after the fourth iteration."""

    def __init__(self, part: str) -> None:
        self.part = part

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 4:
            next(value for name, value, _ in named_state(runner) if name == self.part).flatten()[0] = INF


def make(tmp_path, part=None, wrapper=None, model=None):
    hook = dict(type='AtomicCheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=1)
    return make_runner(
        tmp_path,
        guard=False,
        wrapper=wrapper,
        default_hooks=dict(checkpoint=hook),
        more_hooks=[
            *([dict(type='EMAHook')] if model is None else []),
            *([dict(type='Damage', part=part)] if part else []),
        ],
        **(dict(model=model) if model else {}),
    )


def files(folder):
    return sorted(path.name for path in folder.glob('*.pth'))


@pytest.mark.parametrize(
    'part',
    [
        'head.weight',
        'backbone.1.running_var',
        'moving average module.head.weight',
        "optimizer's exp_avg_sq of head.weight",
    ],
)
def test_the_last_finite_checkpoint_stays(tmp_path, part):
    runner = make(tmp_path, part)
    with pytest.raises(NonFiniteError) as raised:
        runner.train()
    assert str(raised.value).startswith(f'{part} is not finite. No checkpoint is written, and ')
    assert "iter_2.pth' stays. Training ends" in str(raised.value)
    assert files(tmp_path) == ['iter_2.pth']


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path):
    make(tmp_path).train()
    path = tmp_path / 'iter_6.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['optimizer']['state'][0]['exp_avg_sq'].fill_(INF)
    torch.save(checkpoint, path)
    runner = make(tmp_path / 'next')
    runner._load_from, runner._resume = str(path), True
    with pytest.raises(NonFiniteError, match=r"optimizer's exp_avg_sq of \S+ is not finite in '.*iter_6.pth'"):
        runner.train()
    assert files(tmp_path / 'next') == []


def test_the_scale_of_the_loss_is_looked_at(tmp_path):
    runner = make(tmp_path, wrapper=dict(type=CPUScaledOptimWrapper))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=INF)
    assert [name for name, value, _ in named_state(runner) if not value.isfinite().all()] == [
        'scale of the loss scaler'
    ]


class Masked(NormedLine):
    """With buffers that are infinite from the start, or from the first pass on, and one that becomes so."""

    def __init__(self, late=None) -> None:
        super().__init__()
        self.late = late
        self.register_buffer('mask', torch.full((2, 2), -INF).triu(1))
        self.register_buffer('lowest', torch.tensor(INF))  # an observer of the minimum
        self.register_buffer('scratch', torch.zeros(2), persistent=False)
        self.frozen = nn.Parameter(torch.tensor(-INF), requires_grad=False)
        self.register_buffer('codes', torch.zeros(2))

    def forward(self, x, sample, mode='tensor'):
        self.scratch.fill_(INF)
        self.register_buffer('alibi', torch.full((3,), -INF))
        if self.late:
            self.get_buffer(self.late).fill_(INF)
        return super().forward(x, sample, mode)


def test_values_that_are_infinite_from_the_start_are_saved(tmp_path, monkeypatch):
    runner = make(tmp_path, model=Masked())
    said = []
    monkeypatch.setattr(runner.logger, 'info', lambda text, *_: said.append(text))
    runner.train()
    assert files(tmp_path) == ['iter_6.pth']
    lines = [text for text in said if 'not checked' in text]
    assert len(lines) == 1
    assert lines[0].endswith(': frozen, mask, lowest, alibi')


def test_a_buffer_that_becomes_infinite_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match='codes is not finite'):
        make(tmp_path, model=Masked('codes')).train()
    assert files(tmp_path) == []


def test_a_validation_alone_saves_nothing(tmp_path):
    from small_runs import CountedScore  # noqa: F401 (registers it)

    hook = dict(type='AtomicCheckpointHook', save_best='score', rule='greater')
    loader = dict(batch_size=2, dataset=dict(type='NoisyNumbers'), sampler=dict(type='DefaultSampler', shuffle=False))
    part = dict(dataloader=loader, cfg={}, evaluator=dict(type='CountedScore'))
    runner = Runner(
        model=dict(type='DropoutLine'),
        work_dir=str(tmp_path),
        default_hooks=dict(checkpoint=hook),
        experiment_name=tmp_path.name,
        log_level='ERROR',
        **{f'{split}_{key}': value for split in ('val', 'test') for key, value in part.items()},
    )
    runner.val()
    runner.test()
    assert files(tmp_path) == []
    assert 'rror' not in log_of(tmp_path)
