"""NaN and infinite losses and gradients, with very small models."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import ApexOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from processes import finish, join, run_two
from small_runs import CPUScaledOptimWrapper
from torch import nn
from torch.utils.data import Dataset

from vheat_mm.checkpoint.safe_globals import register_safe_globals
from vheat_mm.engine.hooks.non_finite_guard_hook import NonFiniteGuardHook, image_names
from vheat_mm.engine.optimizers.step_guard import are_finite
from vheat_mm.utils.errors import NonFiniteError

register_safe_globals()


@DATASETS.register_module()
class NumberedRows(Dataset):
    """Row ``i`` depends on i alone; ``faults``: row -> what is wrong with it."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, rows, faults=None):
        self.rows = list(rows)
        self.faults = faults or {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        x = torch.randn(3, generator=torch.Generator().manual_seed(row))
        fault = self.faults.get(row, '')
        if fault in ('pixel', 'bright'):
            x[1] = dict(pixel=float('nan'), bright=1e20)[fault]
        return dict(x=x, sample=BaseDataElement(metainfo=dict(img_path=f'row{row}.png', fault=fault)))


@MODELS.register_module()
class NormedLine(BaseModel):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x, sample, mode='tensor'):
        out = self.head(self.backbone(torch.stack(list(x))))
        losses = dict(loss_line=out.square().mean(), loss_size=out.abs().mean())
        faults = {s.fault for s in sample}
        if 'loss' in faults:  # its gradients are finite
            losses['loss_line'] = losses['loss_line'] + float('inf')
        if 'gradient' in faults:  # of the root of zero
            losses['loss_line'] = losses['loss_line'] + (self.backbone[0].weight * 0).square().sum().sqrt()
        return losses


@HOOKS.register_module()
class StateAfterEachStep(Hook):
    """Records statistics at normal priority, as EMAHook reads them."""

    seen: list = []  # noqa: RUF012

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = runner.model.module if hasattr(runner.model, 'module') else runner.model
        self.seen.append(model.backbone[1].running_mean.clone())


def make_runner(work_dir, rows=range(12), faults=None, wrapper=None, patience=3, guard=True, epochs=1, **kwargs):
    StateAfterEachStep.seen = []
    optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.1), clip_grad=dict(max_norm=1.0)) | (wrapper or {})
    hooks = [dict(type='NonFiniteGuardHook', patience=patience)] if guard else []
    name = f'{work_dir}-{len(list(work_dir.glob("*")))}'
    config = dict(
        model=dict(type='NormedLine'),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(type='NumberedRows', rows=rows, faults=faults),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim_wrapper,
        custom_hooks=[*hooks, dict(type='StateAfterEachStep'), *kwargs.pop('more_hooks', [])],
        randomness=dict(seed=5),
        log_level='WARNING',
        experiment_name=re.sub(r'\W', '-', name),
    )
    return Runner(**(config | kwargs))


def state(runner):
    """Weights, buffers and the optimizer's moments."""
    model = runner.model.module if hasattr(runner.model, 'module') else runner.model
    moments = [v for s in runner.optim_wrapper.optimizer.state.values() for v in s.values()]
    return [*(v.clone() for v in model.state_dict().values()), *(m.clone() for m in moments)]


def train(work_dir, *args, **kwargs):
    runner = make_runner(work_dir, *args, **kwargs)
    runner.train()
    return state(runner)


def log_of(work_dir):
    return '\n'.join(file.read_text() for file in sorted(Path(work_dir).glob('*/*.log')))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


WRAPPERS = [{}, dict(accumulative_counts=2), dict(type='CPUAmpOptimWrapper'), dict(type=CPUScaledOptimWrapper)]


@pytest.mark.parametrize('wrapper', WRAPPERS, ids=str)
def test_finite_training_is_the_same_to_the_last_bit(tmp_path, wrapper):
    with_guard = train(tmp_path / 'with', wrapper=wrapper)
    assert_same(with_guard, train(tmp_path / 'without', wrapper=wrapper, guard=False))
    assert 'finite' not in log_of(tmp_path / 'with')


@pytest.mark.parametrize('fault', ['pixel', 'loss', 'gradient', 'bright'])
@pytest.mark.parametrize('wrapper', WRAPPERS[:3], ids=str)
def test_a_skipped_step_leaves_no_trace(tmp_path, wrapper, fault):
    """Weights, moments and statistics equal those of a run without the step's batches."""
    lost = range(4, 8) if 'accumulative_counts' in wrapper else (6, 7)
    rows = [row for row in range(12) if row not in lost]
    found = train(tmp_path / 'found', faults={6: fault}, wrapper=wrapper)
    assert_same(found, train(tmp_path / 'expected', rows=rows, wrapper=wrapper, guard=False))


@pytest.mark.parametrize('wrapper', WRAPPERS[:2], ids=str)
def test_averages_use_finite_statistics(tmp_path, wrapper):
    """With accumulation, the first of two batches is not finite, and hooks run before the step is skipped."""
    ema = dict(type='EMAHook', update_buffers=True, momentum=0.5)
    runner = make_runner(tmp_path, faults={4: 'pixel'}, wrapper=wrapper, more_hooks=[ema])
    runner.train()
    averaged = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model
    assert all(v.isfinite().all() for v in averaged.state_dict().values())
    assert len(StateAfterEachStep.seen) == 6
    assert all(mean.isfinite().all() for mean in StateAfterEachStep.seen)


@pytest.mark.parametrize('hook', [True, False])
def test_without_the_hook_weights_become_nan(tmp_path, hook):
    found = train(tmp_path, faults={6: 'pixel'}, guard=hook)
    assert all(v.isfinite().all() for v in found) == hook


def test_the_log_names_losses_and_images(tmp_path):
    train(tmp_path, faults={2: 'pixel', 6: 'loss', 11: 'gradient'})
    lines = [line for line in log_of(tmp_path).splitlines() if 'finite' in line]
    assert len(lines) == 3
    assert re.search(r'iteration 2: loss is not finite, loss_line=nan, loss_size=nan from row2.png, row3.png', lines[0])
    assert lines[0].endswith('all 6 gradients are not finite; step skipped, 1 so far, 1 in a row')
    assert re.search(r'iteration 4: loss is not finite, loss_line=inf, loss_size=\d\S+ from row6.png', lines[1])
    assert re.search(r'iteration 6: gradient is not finite, from row10.png, row11.png', lines[2])
    assert '1 of 6 gradients are not finite, in the order of the model backbone.0.weight;' in lines[2]
    assert lines[2].endswith('step skipped, 3 so far, 1 in a row')


@pytest.mark.parametrize('wrapper', WRAPPERS, ids=str)
def test_statistics_that_a_finite_loss_makes_infinite_are_named(tmp_path, wrapper):
    """A pixel of 1e20, as of a float image: after it BatchNorm's running variance would be infinite for ever."""
    runner = make_runner(tmp_path, faults={5: 'bright'}, wrapper=wrapper)
    runner.train()
    line = next(line for line in log_of(tmp_path).splitlines() if 'finite' in line)
    rows = 'row4.png, row5.png'
    iteration = 4 if 'accumulative_counts' in wrapper else 3
    assert line.endswith(
        f'iteration {iteration}: backbone.1.running_var is not finite, from {rows}; step skipped, 1 so far, 1 in a row'
    )
    assert all(v.isfinite().all() for v in state(runner))


def test_of_accumulated_batches_only_the_non_finite_one_is_named(tmp_path):
    train(tmp_path, faults={5: 'pixel'}, wrapper=dict(accumulative_counts=3))
    assert 'iteration 3: loss is not finite, loss_line=nan, loss_size=nan from row4.png, row5.png;' in log_of(tmp_path)


def test_patience(tmp_path):
    faults = dict.fromkeys((2, 4, 8, 10, 12), 'pixel')
    runner = make_runner(tmp_path, rows=range(14), faults=faults)
    with pytest.raises(NonFiniteError) as raised:
        runner.train()
    message = str(raised.value)
    assert message.startswith('3 steps in a row')  # of five: the fourth batch was good
    assert 'The first: iteration 5: loss is not finite' in message
    assert (
        'The last: iteration 7: loss is not finite, loss_line=nan, loss_size=nan from row12.png, row13.png' in message
    )
    assert 'The weights are finite' in message
    assert 'clip_grad' in message
    assert_same(state(runner), train(tmp_path / 'expected', rows=(0, 1, 6, 7)))


def test_non_finite_weights_are_named(tmp_path):
    runner = make_runner(tmp_path, patience=1)
    runner.model.head.bias.data.fill_(float('inf'))
    with pytest.raises(NonFiniteError, match=r'training state itself is not finite, first head.bias; go back'):
        runner.train()


@pytest.mark.parametrize('patience', [0, -1, 2.5, '3'])
def test_patience_is_a_positive_integer(patience):
    with pytest.raises(ValueError, match=f'patience must be a positive integer, got {patience!r}'):
        NonFiniteGuardHook(patience)


def test_resuming_continues_the_count(tmp_path):
    checkpoints = dict(checkpoint=dict(type='CheckpointHook', interval=1))
    train(tmp_path / 'first', faults={4: 'pixel', 8: 'pixel'}, default_hooks=checkpoints)
    runner = make_runner(
        tmp_path / 'second', faults={0: 'pixel'}, epochs=2, resume=True, load_from=str(tmp_path / 'first/epoch_1.pth')
    )
    runner.train()
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 3
    assert 'iteration 7: ' in log_of(tmp_path / 'second')
    assert 'step skipped, 3 so far, 1 in a row' in log_of(tmp_path / 'second')


# --- loss scaling


def test_scaler_backoff_is_no_failure(tmp_path):
    """Gradients of 2^124 and more overflow; halving the scale ends that and does not count for patience."""
    wrapper = dict(type=CPUScaledOptimWrapper, init_scale=2.0**127)
    runner = make_runner(tmp_path, rows=range(40), wrapper=wrapper, patience=1)
    runner.train()
    skipped = runner.message_hub.get_scalar('train/steps_skipped_by_scaler').current()
    assert 0 < skipped < 10
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0 ** (127 - skipped)
    assert 'train/skipped_steps' not in runner.message_hub.log_scalars
    assert f'the loss scaler skipped the step, {skipped} times so far' in log_of(tmp_path)
    assert all(v.isfinite().all() for v in state(runner))


@pytest.mark.parametrize('dynamic', [True, False])
def test_gradients_that_are_non_finite_at_any_scale_are_failures(tmp_path, dynamic):
    """From 8 the scale may be halved twice and stay above 1; a fixed scale is not lowered."""
    faults = dict.fromkeys(range(4, 40, 2), 'gradient')
    wrapper = dict(type=CPUScaledOptimWrapper, init_scale=8.0, dynamic=dynamic)
    runner = make_runner(tmp_path, rows=range(40), wrapper=wrapper, faults=faults)
    with pytest.raises(NonFiniteError, match=rf'The last: iteration {7 if dynamic else 5}: '):
        runner.train()
    assert 'train/steps_skipped_by_scaler' in runner.message_hub.log_scalars or not dynamic


def test_a_non_finite_loss_is_a_failure_with_a_scaler_too(tmp_path):
    runner = make_runner(tmp_path, faults={4: 'pixel'}, wrapper=dict(type=CPUScaledOptimWrapper, init_scale=1024.0))
    runner.train()
    assert runner.message_hub.get_scalar('train/skipped_steps').current() == 1
    assert all(v.isfinite().all() for v in state(runner))


# --- other wrappers


@MODELS.register_module()
class TwoLines(BaseModel):
    """Has its own ``train_step`` with two optimizers, as adversarial models have."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, mode='tensor'):
        return x

    def train_step(self, data, optim_wrapper):
        x = torch.stack(data['x'])
        broken = any(s.fault for s in data['sample'])
        losses = dict(a=self.a(x).square().mean(), b=self.b(x).square().mean())
        losses['b'] = losses['b'] * float('nan') if broken else losses['b']
        for name, loss in losses.items():
            optim_wrapper[name].update_params(loss)
        return {f'loss_{name}': loss for name, loss in losses.items()}


def test_each_of_several_optimizers_is_guarded(tmp_path):
    model = TwoLines()
    wrappers = {n: OptimWrapper(torch.optim.SGD(getattr(model, n).parameters(), lr=0.1)) for n in 'ab'}
    runner = make_runner(
        tmp_path,
        rows=range(2),
        faults={0: 'b'},
        model=model,
        optim_wrapper=OptimWrapperDict(**wrappers),
        custom_hooks=[dict(type='NonFiniteGuardHook')],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner.train()
    changed = {name[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {'a'}
    assert re.search(r'loss_a=\d\S+, loss_b=nan from row0.png, row1.png; all 2 gradients', log_of(tmp_path))


def test_wrappers_that_handle_overflow_are_not_changed():
    messages = []
    for wrapper in (SimpleNamespace(), ApexOptimWrapper.__new__(ApexOptimWrapper)):
        runner = SimpleNamespace(
            model=NormedLine(), optim_wrapper=wrapper, hooks=[], logger=SimpleNamespace(info=messages.append)
        )
        NonFiniteGuardHook().before_train(runner)
        assert 'step' not in vars(wrapper)
    assert messages[1] == 'NonFiniteGuardHook does not change ApexOptimWrapper, which handles overflow itself'


def test_a_hook_that_ends_the_run_first_is_named():
    messages = []
    runner = SimpleNamespace(
        model=NormedLine(),
        optim_wrapper=OptimWrapper(torch.optim.SGD([torch.ones(1)], lr=0.1)),
        hooks=[type('CheckInvalidLossHook', (), {})()],
        logger=SimpleNamespace(warning=messages.append),
    )
    NonFiniteGuardHook().before_train(runner)
    assert 'remove it from custom_hooks' in messages[0]


def test_the_optimizer_is_restored(tmp_path):
    runner = make_runner(tmp_path)
    runner.train()
    assert not {'step', 'backward'} & vars(runner.optim_wrapper).keys()


@pytest.mark.parametrize(
    ('data', 'names'),
    [
        (dict(a=[BaseDataElement(metainfo=dict(img_path='x.png', img_id=7))]), ['x.png (id 7)']),
        (dict(sup=dict(samples=[BaseDataElement(metainfo=dict(img_id=7))])), ['image 7']),
        ((torch.ones(2), [BaseDataElement()]), ['image without path']),
        (None, []),
    ],
)
def test_image_names(data, names):
    assert image_names(data) == names


def test_a_large_gradient_is_finite():
    """Its sum of squares overflows; so does the float16 norm of 2^15 elements of 1024."""
    assert are_finite([torch.full((9,), 3e38), torch.ones(2)])
    assert are_finite([torch.full((2**15,), 1024.0, dtype=torch.float16), torch.ones(2)])
    assert are_finite([])
    for value in ('nan', 'inf', '-inf'):
        assert not are_finite([torch.ones(3), torch.tensor([1.0, float(value)])])


# --- two processes


FAULTY = dict(
    loss={5: 'loss'}, pixel={5: 'pixel'}, gradient={5: 'gradient'}, bright={5: 'bright'}
)  # row 5: the second process's third


def in_process(rank, port, folder):
    join(rank, port)
    ddp = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    joined = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=ddp))
    results = {}
    for name, faults in FAULTY.items():
        for wrapper in ({}, dict(accumulative_counts=2)):
            # Processes take turns row by row, two rows to a batch: row 5 is in the second process's second batch.
            work_dir = folder / f'{name}{len(wrapper)}'
            results[name, len(wrapper)] = train(work_dir, range(16), faults, wrapper, **joined)
    for wrapper in ({}, dict(accumulative_counts=2)):
        rows = range(8, 16) if wrapper else [*range(4), *range(8, 16)]
        work_dir = folder / f'expected{len(wrapper)}'
        results['expected', len(wrapper)] = train(work_dir, rows, None, wrapper, guard=False, **joined)
    train(folder / 'alternating', range(16), {5: 'gradient', 8: 'gradient'}, **joined)
    finish(results, rank, folder)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    return folder, run_two(in_process, folder)


@pytest.mark.parametrize('accumulating', [0, 1])
@pytest.mark.parametrize('fault', list(FAULTY))
def test_processes_skip_together(two_processes, fault, accumulating):
    """A fault in one process makes all of them skip the step, and changes nothing else."""
    _, results = two_processes
    for own in results:
        assert_same(own[fault, accumulating], own['expected', accumulating])
    # weights are equal in all processes, statistics are not
    for a, b in zip(*(r[fault, accumulating][-1:] + r[fault, accumulating][:2] for r in results), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('fault', list(FAULTY))
def test_the_process_with_the_fault_is_named(two_processes, fault):
    folder, _ = two_processes
    line = next(line for line in log_of(folder / f'{fault}0').splitlines() if 'finite' in line)
    terms = dict(loss=r'loss_line=inf, loss_size=\d\S+ ', pixel='loss_line=nan, loss_size=nan ').get(fault, '')
    assert re.search(rf'iteration 2: [\w.]+ is not finite, process 1: {terms}from row5.png, row7.png;', line)


def test_each_step_names_its_own_process(two_processes):
    lines = [line for line in log_of(two_processes[0] / 'alternating').splitlines() if 'finite' in line]
    assert ['process 1: from row5' in lines[0], 'process 1' in lines[1], 'process 0: from row8' in lines[1]] == [
        1,
        0,
        1,
    ]
