"""Whether the calls of submodules may be replaced by kernels that read their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vheat_mm.ops.registry import TENSORS, get_backend, is_traced, note

# For each declared class: its forward method then (one that was exchanged since must be called), and the submodules
# that kernels may stand for, by name.
_DECLARED: dict[type, tuple[Callable[..., Any], tuple[tuple[str, type], ...]]] = {}


def declare(cls: type[nn.Module], **submodules: type[nn.Module]) -> None:
    """Declare that kernels may stand for these submodules of a class, and for the module itself inside of others."""
    _DECLARED[cls] = (cls.forward, tuple(submodules.items()))


for _cls in (nn.Conv2d, nn.Identity, nn.LayerNorm, nn.Linear, nn.ReLU, nn.Sequential):
    declare(_cls)


def may_fuse(x: Tensor, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether kernels may stand for the submodules of a module, with no difference but in running time.

    That is: a backend with kernels is chosen, nothing traces operations on ``x``, there are no global module hooks, and
    the module and the submodules declared for ``cls`` are exactly of their classes, neither subclasses nor
    parametrisations, without hooks, with the forward method they were declared with, and with plain tensors for weight
    and bias (convolutions may lack a bias, and pad with zeros).

    Args:
        x: Input of the module.
        module: The module that asks.
        cls: Class that it is asked as.
    """
    if get_backend() == 'reference':
        reason = 'the backend is reference'
    elif is_traced(x):
        reason = 'something traces or transforms operations'
    elif not torch.compiler.is_compiling() and torch_module._has_any_global_hook():
        reason = 'there are global module hooks'
    else:
        reason = why_not_plain(module, cls)
    note(module, f'calls its submodules: {reason}' if reason else 'is computed by kernels')
    return not reason


def why_not_plain(module: nn.Module, cls: type[nn.Module], name: str = 'it') -> str:
    """What keeps :func:`may_fuse` from fusing a module; empty if nothing does."""
    if type(module) is not cls:
        return f'{name} is a {type(module).__name__}, not a {cls.__name__}'
    forward, submodules = _DECLARED[cls]
    if cls.forward is not forward or 'forward' in module.__dict__ or getattr(module, '_compiled_call_impl', None):
        return f'{name} has another forward method'
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f'{name} has hooks'
    if cls is nn.LayerNorm or cls is nn.Linear or cls is nn.Conv2d:
        bias = module.bias
        if type(module.weight) not in TENSORS or not (type(bias) in TENSORS or (bias is None and cls is nn.Conv2d)):
            return f'{name} has a weight of type {type(module.weight).__name__} and a bias of {type(bias).__name__}'
        if cls is nn.Conv2d and (module.padding_mode != 'zeros' or isinstance(module.padding, str)):
            return f'{name} pads with {module.padding_mode!r}, {module.padding!r}'
    for child, child_cls in submodules:
        submodule = module._modules.get(child)
        reason = f'it has no {child}' if submodule is None else why_not_plain(submodule, child_cls, child)
        if reason:
            return reason
    return ''


def is_conv(conv: nn.Conv2d, kernel_size: int, stride: int) -> bool:
    """Whether a convolution has this geometry, padding of half its kernel, no dilation or groups, and a bias."""
    return (
        conv.kernel_size == (kernel_size, kernel_size)
        and conv.stride == (stride, stride)
        and conv.padding == (kernel_size // 2, kernel_size // 2)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is not None
    )
