"""Linear maps on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import compute_dtype, needs_gradient
from vheat_mm.ops.eager import onednn
from vheat_mm.ops.library import custom_op, linear_flops


def supports_inference(x: Tensor, *parameters: Tensor | None) -> bool | str:
    """Whether the kernels without gradients of this file and of ``mlp`` take a map; otherwise why not."""
    if needs_gradient(x, *parameters):
        return 'a gradient is recorded'
    if torch.compiler.is_compiling() and x.ndim != 4:
        return 'the map is not (B, H, W, C)'
    return onednn.supports(x)


def supports_with_bias(x: Tensor, *parameters: Tensor | None) -> bool | str:
    """:func:`supports_inference`, for kernels that need all of their parameters."""
    return 'no bias' if any(p is None for p in parameters) else supports_inference(x, *parameters)


@reference.linear.register('fast', supports_inference, compiled=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`vheat_mm.ops.reference.linear`."""
    return _linear(x.to(compute_dtype(x)), weight, bias)


@custom_op('linear', linear_flops)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, bias = x.reshape(-1, x.shape[-1]), None if bias is None else bias.to(x.dtype)
    return onednn.product(rows, weight.flatten(1).to(x.dtype), bias).view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _supports_linear_with_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool | str:
    if x.ndim != 4 or compute_dtype(x) is not torch.float32:
        return 'PyTorch hands products in bfloat16 to oneDNN already'
    return onednn.supports(x)


@reference.linear.register('fast', _supports_linear_with_grad)
def linear_with_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`vheat_mm.ops.reference.linear`."""
    return onednn.linear_with_grad(x, weight.flatten(1), bias)


@reference.split_linear.register('fast', supports_with_bias, compiled=True)
def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`vheat_mm.ops.reference.split_linear`."""
    first, second = _split_linear(x.to(compute_dtype(x)), weight, bias)
    return first, second


@custom_op('split_linear', linear_flops)
def _split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    halves = zip(weight.flatten(1).to(x.dtype).chunk(2), bias.to(x.dtype).chunk(2), strict=True)
    return [onednn.product(rows, w, b).view(*x.shape[:-1], len(w)) for w, b in halves]


@_split_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0] // 2) for _ in range(2)]


def _supports_split_with_grad(x: Tensor, weight: Tensor, bias: Tensor) -> bool | str:
    return 'no bias' if bias is None else needs_gradient(x, weight) or 'no gradient is recorded'


@reference.split_linear.register('fast', _supports_split_with_grad)
def split_linear_with_grad(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Two products, so that the half which nothing keeps for backward can be freed; on any device."""
    first, second = (
        onednn.linear_with_grad(x, w, b) for w, b in zip(weight.flatten(1).chunk(2), bias.chunk(2), strict=True)
    )
    return first, second
