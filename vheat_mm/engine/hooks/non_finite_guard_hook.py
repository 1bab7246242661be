"""A loss or gradient that is not finite costs one step, not the run, and names the images it came from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import ApexOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.utils.dist import any_rank, unwrap
from vheat_mm.utils.errors import NonFiniteError
from vheat_mm.utils.text import some_of

SKIPPED = 'train/skipped_steps'
SCALED = 'train/steps_skipped_by_scaler'


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skip optimizer steps whose loss or gradient is infinite or not a number; end the run where that does not stop.

    A skipped step leaves weights, the optimizer's state, and the running statistics of BatchNorm and SyncBN as they
    were before the step's first batch. Schedules and the iteration count go on. Each skip is a line in the log, with
    the losses and image paths of the processes at fault, and adds to the scalar ``skipped_steps``, which resuming
    continues. Where every loss and gradient is finite, training is the same to the last bit.

    Works with any ``OptimWrapper``, several of them (``OptimWrapperDict``), gradient accumulation, DDP and FSDP.
    ``ApexOptimWrapper`` and wrappers of other engines (DeepSpeed) watch for overflow themselves and are left alone.
    Under ``AmpOptimWrapper`` the loss scaler skips the step, and lowers its scale, which is how it finds one: such
    steps are counted apart (``steps_skipped_by_scaler``), and count as failures once the scale has come down to 1.

    Args:
        patience: Skipped steps in a row, all processes alike, after which the run ends.

    Raises:
        ValueError: ``patience`` is no positive integer.
        NonFiniteError: That many steps in a row were skipped.
    """

    priority = 'VERY_HIGH'  # statistics are put back before EMAHook copies them

    def __init__(self, patience: int = 20) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f'NonFiniteGuardHook: patience must be a positive integer, got {patience!r}')
        self.patience = patience
        self._guards: list[_Guard] = []
        self._statistics: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._sentinels: list[_Sentinel] = []
        self._window: list[_Batch] = []  # since the last step
        self._in_a_row = 0
        self._first = ''  # event of those in a row

    def before_train(self, runner: Runner) -> None:
        """Put a guard before each optimizer's step."""
        self._release()
        model = unwrap(runner.model)
        sharded = is_sharded(runner.model)
        wrappers = runner.optim_wrapper
        for wrapper in wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]:
            if isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, ApexOptimWrapper):
                self._guards.append(_Guard(wrapper, sharded))
            else:
                kind = type(wrapper).__name__
                runner.logger.info(f'NonFiniteGuardHook leaves {kind} alone, which watches for overflow itself')
        if any(type(hook).__name__ == 'CheckInvalidLossHook' for hook in runner.hooks):
            runner.logger.warning(
                'CheckInvalidLossHook ends the run at a loss for which NonFiniteGuardHook skips a step: '
                'remove it from custom_hooks'
            )
        self._statistics = list(running_statistics(model)) if self._guards else []
        self._kept = [statistic.clone() for statistic in self._statistics]
        if get_world_size() > 1 and not sharded:
            self._sentinels = [_Sentinel(p) for p in first_parameters(model)] if self._guards else []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Keep the running statistics that a poisoned forward pass would spoil."""
        accumulating = any(guard.open for guard in self._guards)
        if self._statistics and not accumulating:
            with torch.no_grad():
                torch._foreach_copy_(self._kept, self._statistics)
        for guard in self._guards:
            guard.begin_iteration()
        if not accumulating:
            for sentinel in self._sentinels:
                sentinel.norms.clear()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Undo and report a skipped step.

        Raises:
            NonFiniteError: It was one too many.
        """
        skips = [guard.skip for guard in self._guards if guard.skip is not None]
        accumulating = any(guard.open for guard in self._guards)
        if skips or accumulating:
            losses = [loss for guard in self._guards for loss in guard.losses]
            self._window.append(_Batch(data_batch, outputs, losses))
        if skips:
            self._put_back()
            self._report(runner, skips)
        elif accumulating:
            # Before the step is decided: an average of weights and buffers may read the statistics at once.
            if self._statistics and not self._window[-1].is_finite():
                self._put_back()
        elif any(guard.stepped for guard in self._guards):
            self._in_a_row = 0
        if not accumulating:
            self._window.clear()

    def after_train(self, runner: Runner) -> None:
        """Give the optimizers back as they were."""
        self._release()

    def _release(self) -> None:
        for guard in self._guards:
            guard.release()
        for sentinel in self._sentinels:
            sentinel.handle.remove()
        self._guards, self._sentinels = [], []
        self._window.clear()

    @torch.no_grad()
    def _put_back(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._kept)

    def _report(self, runner: Runner, skips: list[_Skip]) -> None:
        at_fault = [batch for batch in self._window if not batch.is_finite()]
        gradient = any(not sentinel.is_finite() for sentinel in self._sentinels)
        # All processes have come to the same decision, so all of them meet here.
        sides = all_gather_object(
            _Side(
                loss=bool(at_fault),
                gradient=gradient,
                terms=at_fault[0].terms() if at_fault else '',
                images=[image for batch in at_fault or self._window for image in image_names(batch.data)],
            )
        )
        by_scaler = all(skip.searching for skip in skips) and not any(side.loss for side in sides)
        key = SCALED if by_scaler else SKIPPED
        total = count(runner, key) + 1
        runner.message_hub.update_scalar(key, total)
        names = {id(parameter): name for name, parameter in unwrap(runner.model).named_parameters()}
        what = f'iteration {runner.iter + 1}: {_describe(sides)}; {"; ".join(s.describe(names) for s in skips)}'
        if by_scaler:
            runner.logger.warning(f'{what}; the loss scaler skipped the step, {total} times so far')
            return
        self._in_a_row += 1
        self._first = what if self._in_a_row == 1 else self._first
        runner.logger.warning(f'{what}; step skipped, {total} so far, {self._in_a_row} in a row')
        if self._in_a_row >= self.patience:
            raise NonFiniteError(self._last_words(runner, what, names))

    def _last_words(self, runner: Runner, what: str, names: dict[int, str]) -> str:
        parameters = [p for guard in self._guards for p in guard.parameters()]
        spoilt = [names.get(id(p), 'a parameter') for p in parameters if not bool(p.isfinite().all())]
        if spoilt:
            state = f'The weights themselves are not finite: {some_of(spoilt)}; go back to an earlier checkpoint.'
        else:
            state = 'The weights are finite, as of the last step that was not skipped; so are the checkpoints.'
        first = '' if self._in_a_row == 1 else f'The first: {self._first}. '
        return (
            f'{self._in_a_row} steps in a row had a loss or gradient that is not finite. '
            f'{first}The last: {what}. {state} Look at these images and their annotations (a box without area, pixels '
            'that are not finite); otherwise lower optim_wrapper.optimizer.lr or lengthen its warm-up, set '
            'optim_wrapper.clip_grad=dict(max_norm=1.0), and under AMP take '
            "optim_wrapper.dtype='bfloat16', which has float32's range"
        )


class _Guard:
    """Stands before one optimizer wrapper's step.

    The decision is the same in every process without a message between them: the sum of gradients over processes,
    which DDP makes, carries what is not finite to all; and a loss that is not finite is made to spoil its gradients.
    Where gradients are sharded, processes see different parts and agree by one number.

    Attributes:
        losses: Of this iteration, as given to ``backward``.
        open: Whether gradients of this step have begun to accumulate.
        stepped: Whether the optimizer made a step in this iteration.
        skip: Why it did not.
    """

    def __init__(self, wrapper: OptimWrapper, sharded: bool) -> None:
        self.wrapper = wrapper
        self._sharded = sharded
        self._backward, self._step = wrapper.backward, wrapper.step
        wrapper.backward = self.backward

        @functools.wraps(self._step)  # keeps the mark by which schedulers know that they count its calls
        def step(**kwargs: Any) -> None:
            self.step(**kwargs)

        wrapper.step = step
        self.open = False
        self.begin_iteration()

    def begin_iteration(self) -> None:
        self.losses: list[Tensor] = []
        self.stepped = False
        self.skip: _Skip | None = None

    def release(self) -> None:
        for name in ('backward', 'step'):
            self.wrapper.__dict__.pop(name, None)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        constant = loss.detach()
        self.losses.append(constant)
        self.open = True
        # Exactly 1 for a finite loss. A loss that is infinite can have finite gradients.
        self._backward(loss * (1 + (constant - constant)), **kwargs)

    def step(self, **kwargs: Any) -> None:
        self.open = False
        if self._is_finite():
            self._step(**kwargs)
            self.stepped = True
            return
        self.skip = _Skip([(p, bool(g.isfinite().all())) for p, g in self._gradients()])
        scaler = getattr(self.wrapper, 'loss_scaler', None)
        if scaler is not None and scaler.is_enabled():
            before = scaler.get_scale()
            self._step(**kwargs)  # leaves out the optimizer's step, and lowers the scale
            self.skip.searching = 1 < scaler.get_scale() < before

    def parameters(self) -> Iterator[Tensor]:
        for group in self.wrapper.optimizer.param_groups:
            yield from group['params']

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in self.parameters():
            gradient: Any = parameter.grad
            if gradient is None:
                continue
            if hasattr(gradient, 'to_local'):  # of a sharded tensor
                gradient = gradient.to_local()
            if gradient.is_sparse:
                gradient = gradient.coalesce().values()
            if gradient.numel():
                yield parameter, gradient

    @torch.no_grad()
    def _is_finite(self) -> bool:
        gradients = [gradient for _, gradient in self._gradients()]
        finite = are_finite(gradients)
        return not any_rank(not finite) if self._sharded else finite


@dataclass
class _Skip:
    """A step left out: its parameters with whether their gradients were finite; whether a scaler seeks its scale."""

    parameters: list[tuple[Tensor, bool]]
    searching: bool = False

    def describe(self, names: dict[int, str]) -> str:
        spoilt = [names.get(id(parameter), 'a parameter') for parameter, finite in self.parameters if not finite]
        if len(spoilt) == len(self.parameters):
            return f'all {len(spoilt)} gradients are not finite'
        if not spoilt:
            return 'the gradients of another process are not finite'
        # Gradients are made from the loss back to the input: the trouble began at the last of these.
        shown = spoilt[0] if len(spoilt) == 1 else f'{spoilt[0]} to {spoilt[-1]}'
        return f'{len(spoilt)} of {len(self.parameters)} gradients are not finite, in the order of the model {shown}'


class _Sentinel:
    """Notes whether this process's own gradient of a parameter is finite, before it is summed over processes."""

    def __init__(self, parameter: Tensor) -> None:
        self.norms: list[Tensor] = []
        self.handle = parameter.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.norms.append(torch.linalg.vector_norm(gradient.detach(), float('inf')))

    def is_finite(self) -> bool:
        return all(bool(norm.isfinite()) for norm in self.norms)


class _Batch:
    """A batch that went into a step: its data, what the model returned for it, its losses."""

    def __init__(self, data: Any, outputs: Any, losses: list[Tensor]) -> None:
        self.data = data
        outputs = outputs if isinstance(outputs, Mapping) else {}
        # Not the tensors themselves, which hold on to the graph.
        self.outputs = {k: v.detach() for k, v in outputs.items() if 'loss' in k and isinstance(v, Tensor)}
        self.losses = losses

    def is_finite(self) -> bool:
        return all(bool(loss.isfinite().all()) for loss in self.losses)

    def terms(self) -> str:
        terms = {k: v for k, v in self.outputs.items() if k != 'loss'} or {'loss': self.losses[-1]}
        return some_of([f'{name}={value.mean().item():.4g}' for name, value in terms.items()], limit=16)


@dataclass
class _Side:
    """What one process tells of a skipped step."""

    loss: bool  # whether its own loss was not finite
    gradient: bool  # whether a gradient of its own was seen that is not finite
    terms: str
    images: list[str] = field(default_factory=list)


def _describe(sides: list[_Side]) -> str:
    ranks = [rank for rank, side in enumerate(sides) if side.loss]
    kind = 'loss' if ranks else 'gradient'
    ranks = ranks or [rank for rank, side in enumerate(sides) if side.gradient] or list(range(len(sides)))
    parts = []
    for rank in ranks:
        where = f'process {rank}: ' if len(sides) > 1 else ''
        terms = f'{sides[rank].terms} ' if kind == 'loss' else ''
        parts.append(f'{where}{terms}from {some_of(sides[rank].images)}')
    return f'{kind} is not finite, {"; ".join(parts)}'


def count(runner: Runner, key: str) -> int:
    """What a counter stands at, earlier parts of a resumed run included."""
    scalars = runner.message_hub.log_scalars
    return int(scalars[key].current()) if key in scalars else 0


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether all elements are finite; one number comes from the device, unless some are not."""
    if not tensors:
        return True
    if hasattr(nn.utils, 'get_total_norm'):  # PyTorch 2.6 and later
        norm = nn.utils.get_total_norm(tensors)
    else:
        norm = torch.stack([torch.linalg.vector_norm(t).to(tensors[0].device) for t in tensors]).sum()
    # The norm tells at a fraction of the cost, but overflows by itself: for elements above 1e19, in float16 for less.
    return bool(norm.isfinite()) or all(bool(t.isfinite().all()) for t in tensors)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the gradients only (FSDP of either generation)."""
    kinds = {'FullyShardedDataParallel', 'FSDPModule'}
    return any(kinds & {base.__name__ for base in type(module).__mro__} for module in model.modules())


def running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """Buffers of layers that average over batches: BatchNorm and SyncBN of any library."""
    for module in model.modules():
        if isinstance(getattr(module, 'running_mean', None), Tensor):
            yield from module.buffers(recurse=False)


def first_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The first trained parameter of each part of the model, where the gradients of all that follows arrive."""
    for part in model.children():
        first = next((p for p in part.parameters() if p.requires_grad), None)
        if first is not None:
            yield first


def image_names(data: Any) -> list[str]:
    """Paths of a batch's images, as their data samples tell; samples without one by their id."""
    if isinstance(data, Mapping):
        return [name for value in data.values() for name in image_names(value)]
    if isinstance(data, list | tuple):
        return [name for value in data for name in image_names(value)]
    meta = getattr(data, 'metainfo', None)
    if not isinstance(meta, Mapping):
        return []
    name = meta.get('img_path') or f'image {meta.get("img_id", "without path")}'
    return [f'{name} (id {meta["img_id"]})' if meta.get('img_path') and 'img_id' in meta else str(name)]
