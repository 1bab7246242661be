"""Parameters that get no gradient, before they end a distributed training."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vheat_mm.models.vheat import VHeat
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import some_of


@HOOKS.register_module()
class UnusedParametersHook(Hook):
    """Run the first batch once before training, and freeze output norms of VHeat that no head reads.

    ``DistributedDataParallel`` needs a gradient for each parameter; otherwise it raises an error in the second
    iteration, or waits. Many configs of the libraries read only some outputs of the backbone. In one process, such
    norms get no gradient either, so freezing them changes no result. With ``find_unused_parameters=True``, and
    without ``DistributedDataParallel``, this hook does nothing.

    The batch is run without the wrapper. Weights, buffers (statistics of BatchNorm) and random states are as before
    afterwards; a model that counts its calls in another attribute counts one more.

    Raises:
        ToolError: Other parameters get no gradient in some process.
    """

    priority = 'LOW'  # after AnnotationCheckHook, which names wrong labels

    def __init__(self) -> None:
        self._checked = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Check with the first batch."""
        wrapper = runner.model
        if self._checked or not isinstance(wrapper, DistributedDataParallel) or not isinstance(runner, Runner):
            return  # a strategy of FlexibleRunner wraps the model by itself
        self._checked = True
        if wrapper.find_unused_parameters or wrapper.static_graph:
            return
        model = wrapper.module
        unused = _without_gradient(model, data_batch, runner)
        norms = [name for name in unused if _is_output_norm(model, name)]
        if len(norms) < len(unused):
            raise ToolError(
                f'{len(unused) - len(norms)} parameters get no gradient, which distributed training does not allow: '
                f'{some_of(name for name in unused if name not in norms)}; remove what computes them (out_indices of a '
                'backbone, start_level of a neck), or set find_unused_parameters=True in the config'
            )
        if norms:
            for name in norms:
                model.get_parameter(name).requires_grad = False
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
            runner._maybe_compile('train_step')
            modules = dict.fromkeys(name.rpartition('.')[0] for name in norms)
            runner.logger.info(f'no head reads the output of {some_of(modules)}: frozen, for distributed training')


def _is_output_norm(model: nn.Module, name: str) -> bool:
    parent, _, module = name.rpartition('.')[0].rpartition('.')
    return module.startswith('outnorm') and isinstance(model.get_submodule(parent), VHeat)


def _without_gradient(model: Any, data_batch: Any, runner: Runner) -> list[str]:
    """Names of trainable parameters that get no gradient in at least one process."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = [p.grad for p in parameters.values()]  # after resuming within an accumulation there are some
    for parameter in parameters.values():
        parameter.grad = None
    with _restored_state(model), runner.optim_wrapper.optim_context(model):
        data = model.data_preprocessor(copy.deepcopy(data_batch), training=True)
        loss, _ = model.parse_losses(model._run_forward(data, mode='loss'))
        loss.backward()
    missing = torch.tensor([int(p.grad is None) for p in parameters.values()])
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    all_reduce(missing, op='max')
    return [name for name, flag in zip(parameters, missing.tolist(), strict=True) if flag]


@contextlib.contextmanager
def _restored_state(model: nn.Module) -> Iterator[None]:
    """Give buffers, frozen parameters and random states their values back."""
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    copies = [tensor.detach().clone() for tensor in fixed]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (what the libraries draw from)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        with torch.no_grad():
            for tensor, value in zip(fixed, copies, strict=True):
                tensor.copy_(value)
