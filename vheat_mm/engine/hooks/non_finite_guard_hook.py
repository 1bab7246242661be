"""Optimizer steps with a NaN or infinite loss or gradient are skipped, and the log names the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import ApexOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.engine.finite_state import FiniteState
from vheat_mm.engine.optimizers.step_guard import GradientProbe, SkippedStep, StepGuard, are_finite, is_sharded
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import NonFiniteError
from vheat_mm.utils.text import some_of

SKIPPED = 'train/skipped_steps'
SKIPPED_BY_SCALER = 'train/steps_skipped_by_scaler'


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Skip optimizer steps whose loss, gradient or running statistics are NaN or infinite; end the run if they go on.

    A skipped step leaves weights, optimizer state, and the running statistics of BatchNorm and SyncBN as they were
    before the step's first batch. Schedules and the iteration count continue. The log names the losses and image
    paths of each skip; the scalar ``skipped_steps`` counts them, and continues after resuming. If all losses and
    gradients are finite, training is the same to the last bit.

    Works with any ``OptimWrapper``, several of them (``OptimWrapperDict``), gradient accumulation, DDP and FSDP.
    ``ApexOptimWrapper`` and wrappers of other engines (DeepSpeed) handle overflow themselves and are not changed.
    Under ``AmpOptimWrapper``, the ``GradScaler`` skips the step and lowers its scale. Such steps are counted apart
    (``steps_skipped_by_scaler``); once the scale is down to 1 they count as failures.

    Args:
        patience: Number of skipped steps in a row, in all processes alike, after which the run ends.

    Raises:
        ValueError: ``patience`` is no positive integer.
        NonFiniteError: That many steps in a row were skipped.
    """

    priority = 'VERY_HIGH'  # statistics are restored before EMAHook copies them

    def __init__(self, patience: int = 20) -> None:
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f'NonFiniteGuardHook: patience must be a positive integer, got {patience!r}')
        self.patience = patience
        self._guards: list[StepGuard] = []
        self._named_statistics: dict[str, Tensor] = {}  # those of floating-point numbers
        self._statistics: list[Tensor] = []
        self._saved_statistics: list[Tensor] = []
        self._probes: list[GradientProbe] = []
        self._batches: list[_Batch] = []  # since the last step
        self._in_a_row = 0
        self._first = ''  # message of the first skip of those in a row

    def before_train(self, runner: Runner) -> None:
        """Wrap each optimizer's step."""
        self._release()
        model = unwrap(runner.model)
        sharded = is_sharded(runner.model)
        self._state = FiniteState(runner)
        statistics = dict(running_statistics(model))
        self._named_statistics = {name: value for name, value in statistics.items() if value.is_floating_point()}
        wrappers = runner.optim_wrapper
        for wrapper in wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]:
            if isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, ApexOptimWrapper):
                self._guards.append(StepGuard(wrapper, sharded, list(self._named_statistics.values())))
            else:
                kind = type(wrapper).__name__
                runner.logger.info(f'NonFiniteGuardHook does not change {kind}, which handles overflow itself')
        if any(type(hook).__name__ == 'CheckInvalidLossHook' for hook in runner.hooks):
            runner.logger.warning(
                'CheckInvalidLossHook ends the run at a loss for which NonFiniteGuardHook skips a step: '
                'remove it from custom_hooks'
            )
        self._statistics = list(statistics.values()) if self._guards else []
        self._saved_statistics = [statistic.clone() for statistic in self._statistics]
        if get_world_size() > 1 and not sharded and self._guards:
            self._probes = [GradientProbe(p) for p in first_parameters(model)]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Save the running statistics, which the forward pass may make non-finite."""
        accumulating = any(guard.accumulating for guard in self._guards)
        if self._statistics and not accumulating:
            with torch.no_grad():
                torch._foreach_copy_(self._saved_statistics, self._statistics)
        for guard in self._guards:
            guard.begin_iteration()
        if not accumulating:
            for probe in self._probes:
                probe.norms.clear()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Undo and report a skipped step.

        Raises:
            NonFiniteError: ``patience`` steps in a row were skipped.
        """
        skips = [guard.skip for guard in self._guards if guard.skip is not None]
        accumulating = any(guard.accumulating for guard in self._guards)
        if skips or accumulating:
            losses = [loss for guard in self._guards for loss in guard.losses]
            statistics = self._named_statistics
            bad = (
                []
                if are_finite(list(statistics.values()))
                else [k for k, v in statistics.items() if not are_finite([v])]
            )
            self._batches.append(_Batch(data_batch, outputs, losses, bad))
        if skips:
            self._restore_statistics()
            self._report(runner, skips)
        elif accumulating:
            # Not only when the step is skipped: EMAHook with update_buffers=True reads the statistics now.
            if self._statistics and not self._batches[-1].is_finite():
                self._restore_statistics()
        elif any(guard.stepped for guard in self._guards):
            self._in_a_row = 0
        if not accumulating:
            self._batches.clear()

    def after_train(self, runner: Runner) -> None:
        """Restore the optimizer wrappers."""
        self._release()

    def _release(self) -> None:
        for guard in self._guards:
            guard.release()
        for probe in self._probes:
            probe.handle.remove()
        self._guards, self._probes = [], []
        self._batches.clear()

    @torch.no_grad()
    def _restore_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._saved_statistics)

    def _report(self, runner: Runner, skips: list[SkippedStep]) -> None:
        bad = [batch for batch in self._batches if not batch.has_finite_loss()]
        # A non-finite loss explains the statistics after it.
        shaken = [batch for batch in self._batches if batch.statistics and not bad]
        # A collective call: all processes skip the same steps.
        reports = all_gather_object(
            _RankReport(
                loss=bool(bad),
                gradient=any(not probe.is_finite() for probe in self._probes),
                terms=bad[0].terms() if bad else '',
                images=[image for batch in bad or shaken or self._batches for image in image_names(batch.data)],
                statistics=shaken[0].statistics if shaken else [],
            )
        )
        explained = any(report.loss or report.statistics for report in reports)
        by_scaler = all(skip.scaler_backoff for skip in skips) and not explained
        key = SKIPPED_BY_SCALER if by_scaler else SKIPPED
        scalars = runner.message_hub.log_scalars
        total = 1 + (int(scalars[key].current()) if key in scalars else 0)
        runner.message_hub.update_scalar(key, total)
        names = {id(parameter): name for name, parameter in unwrap(runner.model).named_parameters()}
        what = f'iteration {runner.iter + 1}: {_describe(reports)}'
        if any(report.loss for report in reports) or not explained:  # for statistics, this hook made the gradients NaN
            what += f'; {"; ".join(skip.describe(names) for skip in skips)}'
        if by_scaler:
            runner.logger.warning(f'{what}; the loss scaler skipped the step, {total} times so far')
            return
        self._in_a_row += 1
        self._first = what if self._in_a_row == 1 else self._first
        runner.logger.warning(f'{what}; step skipped, {total} so far, {self._in_a_row} in a row')
        if self._in_a_row >= self.patience:
            raise NonFiniteError(self._failure_message(what))

    def _failure_message(self, what: str) -> str:
        if bad := self._state.first_non_finite():
            state = f'The training state itself is not finite, first {bad}; go back to an earlier checkpoint.'
        else:
            state = 'The weights are finite, as of the last step that was not skipped, and so is the optimizer.'
        first = '' if self._in_a_row == 1 else f'The first: {self._first}. '
        return (
            f'{self._in_a_row} steps in a row had a loss, gradient or running statistics that are not finite. '
            f'{first}The last: {what}. {state} Look at these images and their annotations (a box without area, pixels '
            'that are not finite); otherwise lower optim_wrapper.optimizer.lr or lengthen its warm-up, set '
            'optim_wrapper.clip_grad=dict(max_norm=1.0), and under AMP take '
            "optim_wrapper.dtype='bfloat16', which has float32's range"
        )


class _Batch:
    """A batch of a step: its data, what the model returned for it, its losses, and non-finite statistics after it."""

    def __init__(self, data: Any, outputs: Any, losses: list[Tensor], statistics: list[str]) -> None:
        self.data, self.statistics = data, statistics
        outputs = outputs if isinstance(outputs, Mapping) else {}
        # Detached, as the tensors keep the graph in memory.
        self.outputs = {k: v.detach() for k, v in outputs.items() if 'loss' in k and isinstance(v, Tensor)}
        self.losses = losses

    def is_finite(self) -> bool:
        return self.has_finite_loss() and not self.statistics

    def has_finite_loss(self) -> bool:
        return all(bool(loss.isfinite().all()) for loss in self.losses)

    def terms(self) -> str:
        terms = {k: v for k, v in self.outputs.items() if k != 'loss'} or {'loss': self.losses[-1]}
        return some_of([f'{name}={value.mean().item():.4g}' for name, value in terms.items()], limit=16)


@dataclass
class _RankReport:
    """One process's information on a skipped step."""

    loss: bool  # whether its own loss was not finite
    gradient: bool  # whether one of its own gradients was not finite
    terms: str
    images: list[str]
    statistics: list[str]  # names of running statistics that a finite loss made non-finite


def _describe(reports: list[_RankReport]) -> str:
    ranks = [rank for rank, report in enumerate(reports) if report.loss]
    kind = 'loss' if ranks else 'gradient'
    if not ranks and (ranks := [rank for rank, report in enumerate(reports) if report.statistics]):
        kind = some_of(reports[ranks[0]].statistics, 1)
    ranks = ranks or [rank for rank, report in enumerate(reports) if report.gradient] or list(range(len(reports)))
    parts = []
    for rank in ranks:
        where = f'process {rank}: ' if len(reports) > 1 else ''
        terms = f'{reports[rank].terms} ' if kind == 'loss' else ''
        parts.append(f'{where}{terms}from {some_of(reports[rank].images)}')
    return f'{kind} is not finite, {"; ".join(parts)}'


def running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers of layers that average over batches, by name: BatchNorm and SyncBN of any library."""
    for prefix, module in model.named_modules():
        if isinstance(getattr(module, 'running_mean', None), Tensor):
            for name, buffer in module.named_buffers(recurse=False):
                yield f'{prefix}.{name}' if prefix else name, buffer


def first_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The first trained parameter of each child module, which the gradients of all its layers reach."""
    for part in model.children():
        first = next((p for p in part.parameters() if p.requires_grad), None)
        if first is not None:
            yield first


def image_names(data: Any) -> list[str]:
    """Image paths of a batch from the metadata of its data samples; without a path, the image id."""
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, list | tuple):
        return [name for value in data for name in image_names(value)]
    meta = getattr(data, 'metainfo', None)
    if not isinstance(meta, Mapping):
        return []
    name = meta.get('img_path') or f'image {meta.get("img_id", "without path")}'
    return [f'{name} (id {meta["img_id"]})' if meta.get('img_path') and 'img_id' in meta else str(name)]
