"""Autograd and autocast for kernels: whether gradients are recorded, types of products, first derivatives only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type that a matrix product of ``x`` is computed in: that of autocast where it is on."""
    if not hasattr(torch, 'get_autocast_dtype'):  # PyTorch before 2.4, where no kernel runs
        return x.dtype
    device = x.device.type
    if x.dtype is torch.float64 or not x.is_floating_point():  # which autocast leaves alone
        return x.dtype
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which operations on the device of ``x`` keep their types; some devices (meta) have no autocast."""
    has_autocast = getattr(torch.amp, 'is_autocast_available', lambda device: device in ('cpu', 'cuda'))
    return torch.autocast(x.device.type, enabled=False) if has_autocast(x.device.type) else nullcontext()


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse gradients of gradients, and batches of them, in a ``backward`` that has neither.

    Raises:
        RuntimeError: ``create_graph=True``; ``is_grads_batched=True``, or ``vmap`` over a backward pass.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        # PyTorch runs backward with gradients enabled under create_graph=True only; a compiler, while it traces.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                'the kernels of vheat_mm have no second derivative (create_graph=True): '
                'set the environment variable VHEAT_KERNELS=reference, or run it in ops.use_backend("reference")'
            )
        if any(grad is not None and _is_batched(grad) for grad in grads):
            raise RuntimeError(
                'the kernels of vheat_mm take one gradient at a time (is_grads_batched=True, vmap over backward): '
                'set the environment variable VHEAT_KERNELS=reference, or use torch.func on the model'
            )
        return backward(ctx, *grads)

    return checked
