"""Gradients that wait for the optimizer's next step, as part of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import all_reduce_params
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from vheat_mm.utils.dist import unwrap

COLLECT = 'before_collective_save'  # called on all processes' hooks; MMEngine's own call is made in the first one only


def are_waiting(wrapper: Any) -> bool:
    """Whether gradients have been accumulated since the last step."""
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return any(isinstance(each, OptimWrapper) and not each.should_update() for each in wrappers)


def collect(runner: Runner) -> dict[str, Tensor]:
    """The mean of the processes' gradients so far, by names of parameters, on the CPU. All processes must call it.

    With the mean in every process, the next step is what it would have been: DDP averages then over all of them.
    """
    named = [(name, p.grad) for name, p in unwrap(runner.model).named_parameters() if p.grad is not None]
    gradients = {name: gradient.detach().clone() for name, gradient in named}
    all_reduce_params(list(gradients.values()), op='mean')
    return {name: gradient.cpu() for name, gradient in gradients.items()}


def restore(runner: Runner, gradients: dict[str, Tensor]) -> None:
    """Give parameters the gradients of a checkpoint."""
    with torch.no_grad():
        for name, parameter in unwrap(runner.model).named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter)
