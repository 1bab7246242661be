"""Whether the calls of submodules may be replaced by kernels that read their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vheat_mm.ops.registry import TENSORS, get_backend, is_traced, note

_CALL, _CONV_FORWARD = nn.Module.__call__, nn.Conv2d._conv_forward  # as people patch them

# For each declared class: its forward method then (one that was exchanged since must be called), and the submodules
# that kernels may stand for, by name.
_DECLARED: dict[type, tuple[Callable[..., Any], tuple[tuple[str, type], ...]]] = {}


def declare(cls: type[nn.Module], **submodules: type[nn.Module]) -> None:
    """Declare that kernels may stand for these submodules of a class, and for the module itself inside of others."""
    _DECLARED[cls] = (cls.forward, tuple(submodules.items()))


for _cls in (nn.Conv2d, nn.Identity, nn.LayerNorm, nn.Linear, nn.ReLU, nn.Sequential):
    declare(_cls)


def may_fuse(x: Tensor, module: nn.Module, cls: type[nn.Module], is_as_built: Callable[[], bool] | None = None) -> bool:
    """Whether kernels may stand for the submodules of a module, with no difference but in running time.

    That is: a backend with kernels is chosen, nothing traces operations on ``x``, there are no global module hooks, and
    the module and the submodules declared for ``cls`` are exactly of their classes, neither subclasses nor
    parametrisations, without hooks, with the forward method they were declared with, and with plain tensors for weight
    and bias (convolutions may lack a bias, and pad with zeros).

    Args:
        x: Input of the module.
        module: The module that asks.
        cls: Class that it is asked as.
        is_as_built: Asked last, of submodules that are plain: whether their geometry is what the kernels know.
    """
    if get_backend() == 'reference':
        reason = 'the backend is reference'
    elif is_traced(x):
        reason = 'something traces or transforms operations'
    elif torch_module._has_any_global_hook():
        reason = 'there are global module hooks'
    elif nn.Module.__call__ is not _CALL:
        reason = 'torch.nn.Module has another __call__ method'
    else:
        reason = why_not_plain(module, cls)
        if not reason and is_as_built is not None and not is_as_built():
            reason = 'the geometry of a submodule has changed'
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
        if cls is nn.LayerNorm and module.weight.ndim != 1:
            return f'{name} normalises over {module.weight.ndim} dimensions'
        if cls is nn.Conv2d and ('_conv_forward' in module.__dict__ or nn.Conv2d._conv_forward is not _CONV_FORWARD):
            return f'{name} has another _conv_forward method'
        if cls is nn.Conv2d and (module.padding_mode != 'zeros' or isinstance(module.padding, str)):
            return f'{name} pads with {module.padding_mode!r}, {module.padding!r}'
    for child, child_cls in submodules:
        submodule = module._modules.get(child)
        reason = f'it has no {child}' if submodule is None else why_not_plain(submodule, child_cls, child)
        if reason:
            return reason
    return ''


def has_plain_layers(layers: nn.Sequential, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether a sequential holds plain modules of these classes and nothing else."""
    return len(layers) == len(classes) and not any(map(why_not_plain, layers, classes))


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
