"""Whether all that a checkpoint would hold is finite: weights, buffers, averages, optimizer and loss scaler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn

from vheat_mm.engine.optimizers.step_guard import are_finite, local_values
from vheat_mm.utils.dist import any_rank, unwrap
from vheat_mm.utils.errors import NonFiniteError
from vheat_mm.utils.text import some_of


class FiniteState:
    """The state of a training, compared with how it started.

    Trained parameters, running statistics and the optimizer's state must be finite. Frozen parameters and other buffers
    may hold infinity from the start (masks, observers of minimum and maximum), and so may buffers that are made later.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._judged: dict[str, bool] = {}  # of tensors that may be infinite: whether they were finite at first
        self._new_exempt: list[str] = []
        self.first_non_finite(judge_all=False)

    def require(self, kept: str | None, alone: bool = False) -> None:
        """Check before a checkpoint is written; all processes must call this, unless this one saves ``alone``.

        ``kept``: the last checkpoint, which stays.

        Raises:
            NonFiniteError: Something is not finite; the message names it.
        """
        first = self.first_non_finite()
        if self._new_exempt:
            self._runner.logger.info(
                f'not checked, because they were not finite from the start: {some_of(self._new_exempt)}'
            )
            self._new_exempt = []
        if first is not None if alone else any_rank(first is not None):
            raise NonFiniteError(
                f'{first or "the state of another process"} is not finite. No checkpoint is written, '
                f'{f"and {kept!r} stays" if kept else "and there is no earlier one"}. Training ends, because this '
                'would not become finite again: lower optim_wrapper.optimizer.lr, or set '
                'optim_wrapper.clip_grad=dict(max_norm=1.0), and resume'
            )

    def require_resumed(self, path: str) -> None:
        """Check what all processes have resumed from ``path``. Raises NonFiniteError if something is not finite."""
        first = self.first_non_finite()
        if any_rank(first is not None):
            raise NonFiniteError(
                f'{first or "the state of another process"} is not finite in {path!r}: resume from an earlier one'
            )

    def first_non_finite(self, judge_all: bool = True) -> str | None:
        """Name of the first tensor of this process that is not finite; usually one number is read from the device."""
        judged = []
        for name, tensor, must_be_finite in named_state(self._runner):
            key = f'{name} {tuple(tensor.shape)}'
            if not must_be_finite and key not in self._judged:
                self._judged[key] = _is_finite(tensor)
                if not self._judged[key]:
                    self._new_exempt.append(name)
            if judge_all and (must_be_finite or self._judged[key]):
                judged.append((name, tensor))
        if are_finite([tensor for _, tensor in judged]):
            return None
        return next(name for name, tensor in judged if not _is_finite(tensor))


def named_state(runner: Runner) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, values in this process, and whether they must be finite, of all numbers that a checkpoint holds."""
    model = unwrap(runner.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    yield from _named_weights(model, '')
    for hook in runner.hooks:
        if isinstance(average := getattr(hook, 'ema_model', None), nn.Module):
            yield from _named_weights(average, 'moving average ')
    wrappers = runner.optim_wrapper
    for wrapper in wrappers.values() if isinstance(wrappers, OptimWrapperDict) else [wrappers]:
        state = getattr(getattr(wrapper, 'optimizer', None), 'state', {})
        for parameter, entries in state.items():
            name = names.get(id(parameter), 'a parameter')
            for key, value in entries.items() if isinstance(entries, dict) else ():
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor):
                        yield from _values(f"optimizer's {key} of {name}", tensor, True)
        scaler: Any = getattr(wrapper, 'loss_scaler', None)
        if hasattr(scaler, 'get_scale') and scaler.is_enabled():
            yield 'scale of the loss scaler', torch.tensor(scaler.get_scale()), True


def _named_weights(model: nn.Module, start: str) -> Iterator[tuple[str, Tensor, bool]]:
    for prefix, module in model.named_modules():
        prefix = f'{start}{prefix}.' if prefix else start
        for name, parameter in module.named_parameters(recurse=False):
            yield from _values(f'{prefix}{name}', parameter, parameter.requires_grad)
        running = isinstance(getattr(module, 'running_mean', None), Tensor)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield from _values(f'{prefix}{name}', buffer, running)


def _values(name: str, tensor: Tensor, must_be_finite: bool) -> Iterator[tuple[str, Tensor, bool]]:
    values = local_values(tensor.detach())
    if (values.is_floating_point() or values.is_complex()) and values.numel() and not values.is_meta:
        yield name, values.float() if values.dtype.itemsize == 1 else values, must_be_finite


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
