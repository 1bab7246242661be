"""Optimizer steps that are skipped when a loss or gradient is NaN or infinite."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from vheat_mm.utils.dist import any_rank


class StepGuard:
    """Wraps ``backward`` and ``step`` of one optimizer wrapper.

    All processes decide the same without communication: DDP sums gradients over processes, so NaN and infinity reach
    all of them, and a non-finite loss, or running statistics that the forward pass made non-finite, are made to give
    non-finite gradients. With sharded gradients the processes see different parts, so they exchange one number.

    Attributes:
        losses: Of this iteration, as given to ``backward``.
        accumulating: Whether there are gradients that wait for the next step.
        stepped: Whether the optimizer made a step in this iteration.
        skip: The step that was skipped in this iteration, if any.
    """

    def __init__(self, wrapper: OptimWrapper, sharded: bool, statistics: list[Tensor]) -> None:
        self.wrapper = wrapper
        self._statistics = statistics
        self._sharded = sharded
        self._backward, self._step = wrapper.backward, wrapper.step
        wrapper.backward = self.backward

        @functools.wraps(self._step)  # schedulers mark the function whose calls they count
        def step(**kwargs: Any) -> None:
            self.step(**kwargs)

        wrapper.step = step
        self.accumulating = False
        self.begin_iteration()

    def begin_iteration(self) -> None:
        self.losses: list[Tensor] = []
        self.stepped = False
        self.skip: SkippedStep | None = None

    def release(self) -> None:
        """Restore the optimizer wrapper."""
        for name in ('backward', 'step'):
            self.wrapper.__dict__.pop(name, None)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        constant = loss.detach()
        self.losses.append(constant)
        self.accumulating = True
        # The factor is exactly 1 for a finite loss. An infinite loss alone can have finite gradients.
        self._backward(loss * (1 + (constant - constant) + self._zero_if_finite(constant)), **kwargs)

    @torch.no_grad()
    def _zero_if_finite(self, like: Tensor) -> Tensor | float:
        """Zero, or NaN if a running statistic is not finite; nothing is read from the device."""
        if not self._statistics:
            return 0.0
        norms = torch._foreach_norm(torch._foreach_sub(self._statistics, self._statistics))
        return torch.stack([norm.to(like) for norm in norms]).sum()

    def step(self, **kwargs: Any) -> None:
        self.accumulating = False
        finite = are_finite([gradient for _, gradient in self._gradients()])
        if not any_rank(not finite) if self._sharded else finite:
            self._step(**kwargs)
            self.stepped = True
            return
        self.skip = SkippedStep([(p, bool(g.isfinite().all())) for p, g in self._gradients()])
        scaler = getattr(self.wrapper, 'loss_scaler', None)
        if scaler is not None and scaler.is_enabled():
            before = scaler.get_scale()
            self._step(**kwargs)  # skips the optimizer's step and lowers the scale
            self.skip.scaler_backoff = 1 < scaler.get_scale() < before

    def parameters(self) -> Iterator[Tensor]:
        for group in self.wrapper.optimizer.param_groups:
            yield from group['params']

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter in self.parameters():
            if parameter.grad is not None and (gradient := local_values(parameter.grad)).numel():
                yield parameter, gradient


@dataclass
class SkippedStep:
    """A skipped step.

    Attributes:
        parameters: With whether their gradients were finite.
        scaler_backoff: Whether a ``GradScaler`` lowered its scale, to a value above 1.
    """

    parameters: list[tuple[Tensor, bool]]
    scaler_backoff: bool = False

    def describe(self, names: dict[int, str]) -> str:
        """A sentence for the log; ``names``: id of a parameter -> name."""
        bad = [names.get(id(parameter), 'a parameter') for parameter, finite in self.parameters if not finite]
        if len(bad) == len(self.parameters):
            return f'all {len(bad)} gradients are not finite'
        if not bad:
            return 'the gradients of another process are not finite'
        # The backward pass runs from the loss to the input: the last name is where the first bad gradient appeared.
        shown = bad[0] if len(bad) == 1 else f'{bad[0]} to {bad[-1]}'
        return f'{len(bad)} of {len(self.parameters)} gradients are not finite, in the order of the model {shown}'


class GradientProbe:
    """Records whether this process's own gradient of a parameter is finite, before DDP sums it over processes."""

    def __init__(self, parameter: Tensor) -> None:
        self.norms: list[Tensor] = []
        self.handle = parameter.register_hook(self._record)

    def _record(self, gradient: Tensor) -> None:
        self.norms.append(torch.linalg.vector_norm(gradient.detach(), float('inf')))

    def is_finite(self) -> bool:
        return all(bool(norm.isfinite()) for norm in self.norms)


def local_values(tensor: Any) -> Tensor:
    """The values of a sharded or sparse tensor that are in this process; any other tensor itself."""
    if hasattr(tensor, 'to_local'):
        tensor = tensor.to_local()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether all elements are finite; only one number is read from the device if they are."""
    if not tensors:
        return True
    if hasattr(nn.utils, 'get_total_norm'):  # PyTorch 2.6 and later
        norm = nn.utils.get_total_norm(tensors)
    else:
        norm = torch.stack([torch.linalg.vector_norm(t).to(tensors[0].device) for t in tensors]).sum()
    # The norm is much cheaper, but overflows for elements above 1e19, in float16 for smaller ones.
    return bool(norm.isfinite()) or all(bool(t.isfinite().all()) for t in tensors)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the gradients (FSDP 1 or 2)."""
    kinds = {'FullyShardedDataParallel', 'FSDPModule'}
    return any(kinds & {base.__name__ for base in type(module).__mro__} for module in model.modules())
