"""Accumulated gradients as part of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce_params
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from vheat_mm.utils.dist import unwrap


def has_accumulated_gradients(wrapper: Any) -> bool:
    """Whether gradients have been accumulated since the last optimizer step."""
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return any(isinstance(each, OptimWrapper) and not each.should_update() for each in wrappers)


def average_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The accumulated gradients averaged over processes, by parameter name, on the CPU; all processes must call this.

    After resuming with the average in every process, the next step is the same: DDP averages over processes again.
    """
    named = unwrap(model).named_parameters()
    gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    all_reduce_params(list(gradients.values()), op='mean')
    return {name: gradient.cpu() for name, gradient in gradients.items()}


@torch.no_grad()
def restore_gradients(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Set the gradients that :func:`average_gradients` returned, in place."""
    for name, parameter in unwrap(model).named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)
