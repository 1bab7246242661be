"""The MLP, some rows at a time, so that its wide map stays in the cache; training keeps little of it, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import compute_dtype, needs_gradient, once_differentiable, without_autocast
from vheat_mm.ops.eager import onednn
from vheat_mm.ops.eager.linear import supports_with_bias
from vheat_mm.ops.library import custom_op, mlp_flops

# Repeating the first product of an MLP in backward costs C / 2 operations for each byte not kept: too many from here.
KEEP_FROM_WIDTH = 384


@reference.mlp.register('fast', supports_with_bias, compiled=True)
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.mlp`."""
    return _mlp(x.to(compute_dtype(x)), weight1, bias1, weight2, bias2)


@custom_op('mlp', mlp_flops)
def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    w1, w2 = weight1.flatten(1).to(x.dtype), weight2.flatten(1).to(x.dtype)
    b1, b2 = bias1.to(x.dtype), bias2.to(x.dtype)
    parts = [onednn.product(onednn.product(rows, w1, b1, post='gelu'), w2, b2) for (rows,) in onednn.split_rows(x)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], weight2.shape[0])


@_mlp.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])


def _supports_training(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool | str:
    if bias1 is None or bias2 is None:
        return 'no bias'
    return needs_gradient(x, weight1, weight2) or 'no gradient is recorded'


@reference.mlp.register('fast', _supports_training)
def mlp_with_grad(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.mlp`."""
    # Norms give float32 under autocast on a GPU; what is kept is what the products read.
    return _Mlp.apply(x.to(compute_dtype(x)), weight1, bias1, weight2, bias2)


class _Mlp(torch.autograd.Function):
    """Keeps its input, and of two maps four times as wide none, or the one before GELU; backward repeats the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        dtype = x.dtype
        w1, w2 = weight1.flatten(1).to(dtype), weight2.flatten(1).to(dtype)
        b1, b2 = bias1.to(dtype), bias2.to(dtype)
        keeps = x.device.type == 'cpu' and x.shape[-1] >= KEEP_FROM_WIDTH
        wide: list[Tensor] = []
        out = x.new_empty(*x.shape[:-1], w2.shape[0])
        with without_autocast(x):
            fuses_gelu = not keeps and onednn.runs_on_cpu(x)
            for rows, result in onednn.split_rows(x, out):
                if fuses_gelu:
                    hidden = onednn.product(rows, w1, b1, post='gelu')
                else:
                    before = onednn.dense(rows, w1, b1)
                    hidden = F.gelu(before)
                    if keeps:
                        wide.append(before)
                result.copy_(onednn.dense(hidden, w2, b2))
        ctx.save_for_backward(x, weight1, bias1, weight2, *wide)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, *wide = ctx.saved_tensors
        dtype = x.dtype
        w1, w2, b1 = weight1.flatten(1).to(dtype), weight2.flatten(1).to(dtype), bias1.to(dtype)
        grad_x = onednn.empty_rows(x)
        totals: list[Tensor] = []
        with without_autocast(x):
            for index, (rows, grads, result) in enumerate(onednn.split_rows(x, grad, grad_x)):
                before = wide[index] if wide else onednn.dense(rows, w1, b1)
                parts = [*onednn.weight_gradient(grads, F.gelu(before))]
                grad_before = torch.ops.aten.gelu_backward(onednn.dense(grads, w2.mT), before)
                parts += onednn.weight_gradient(grad_before, rows)
                result.copy_(onednn.dense(grad_before, w1.mT))
                totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
        grad_w2, grad_b2, grad_w1, grad_b1 = totals
        return grad_x, grad_w1.view_as(weight1), grad_b1, grad_w2.view_as(weight2), grad_b2
