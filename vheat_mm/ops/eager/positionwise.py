"""Fast forms of :mod:`vheat_mm.ops.positionwise` on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vheat_mm.ops.autograd import once
from vheat_mm.ops.eager import onednn

# Fewer rows than this do not pay for reading a stage's weights again.
MIN_ROWS = 1024

# Repeating an MLP's first product in backward costs C / 2 operations for each byte not kept: too many from here on.
KEEP_FROM_WIDTH = 384


def takes_by_position(function: Callable[..., Tensor], *maps: Tensor) -> bool:
    first = maps[0]
    return (
        not torch.is_grad_enabled()
        and first.device.type == 'cpu'
        and not onednn.watched(first)
        and first.numel() // max(1, first.shape[-1]) > onednn.group_rows(first)
        and all(m.is_contiguous() and m.shape == first.shape for m in maps)
    )


def by_position(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    for group in onednn.split_rows(*maps):
        group[-1].copy_(function(*group))  # the rows of a contiguous map are its own memory
    return maps[-1]


def takes_by_image(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    return onednn.applies(x) and not torch.is_grad_enabled() and x.shape[0] > 1 and _images(x) < x.shape[0]


def by_image(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    results = None
    for index, images in enumerate(x.split(_images(x))):
        result = function(images)
        if results is None:
            results = result.new_empty(x.shape)
        first = index * _images(x)
        results[first : first + len(images)] = result
    return cast(Tensor, results)


def _images(x: Tensor) -> int:
    """Images of a batch whose maps stay in the cache together, and are as many rows as a product needs."""
    return max(onednn.slices_at_a_time(x), -(-MIN_ROWS // (x.shape[1] * x.shape[2])))


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not onednn.applies(x):
        return False
    if onednn.needs_gradient(x, weight):
        # MKL's bfloat16 products are oneDNN's already
        return x.ndim == 4 and onednn.compute_type(x) is torch.float32
    return isinstance(weight, nn.Parameter) and not weight.is_inference()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if onednn.needs_gradient(x, weight):
        return onednn.differentiable(x, weight.flatten(1), bias)
    dtype = onednn.compute_type(x)
    out = onednn.product(_rows(x, dtype), onednn.prepared(weight, dtype)[0], None if bias is None else bias.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def takes_split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return takes_linear(x, weight, bias) or (onednn.needs_gradient(x, weight) and not onednn.watched(x))


def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    if onednn.needs_gradient(x, weight):
        # Two products, so that the half which nothing keeps for backward can be freed.
        first, second = (onednn.differentiable(x, w, b) for w, b in zip(weight.chunk(2), bias.chunk(2), strict=True))
        return first, second
    dtype = onednn.compute_type(x)
    rows = _rows(x, dtype)
    biases = bias.to(dtype).chunk(2)
    first, second = (
        onednn.product(rows, w, b).view(*x.shape[:-1], -1)
        for w, b in zip(onednn.prepared(weight, dtype, parts=2), biases, strict=True)
    )
    return first, second


def takes_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool:
    if onednn.needs_gradient(x, weight1, weight2):
        return not onednn.watched(x)
    return takes_linear(x, weight1, bias1)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    dtype = onednn.compute_type(x)
    if onednn.needs_gradient(x, weight1, weight2):
        # Norms give float32 under autocast on a GPU; what is kept is what the products read.
        return _Mlp.apply(x.to(dtype), weight1, bias1, weight2, bias2)
    w1, w2 = onednn.prepared(weight1, dtype)[0], onednn.prepared(weight2, dtype)[0]
    b1, b2 = bias1.to(dtype), bias2.to(dtype)
    parts = [
        onednn.product(onednn.product(rows.to(dtype), w1, b1, post='gelu'), w2, b2) for (rows,) in onednn.split_rows(x)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], weight2.shape[0])


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
        with torch.autocast(x.device.type, enabled=False):
            for rows, result in onednn.split_rows(x, out):
                if onednn.applies(rows) and not keeps:
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
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, *wide = ctx.saved_tensors
        dtype = x.dtype
        w1, w2, b1 = weight1.flatten(1).to(dtype), weight2.flatten(1).to(dtype), bias1.to(dtype)
        grad_x = onednn.empty_rows(x)
        totals: list[Tensor] = []
        with torch.autocast(x.device.type, enabled=False):
            for index, (rows, grads, result) in enumerate(onednn.split_rows(x, grad, grad_x)):
                before = wide[index] if wide else onednn.dense(rows, w1, b1)
                parts = [*onednn.weight_gradient(grads, F.gelu(before))]
                grad_before = torch.ops.aten.gelu_backward(onednn.dense(grads, w2.mT), before)
                parts += onednn.weight_gradient(grad_before, rows)
                result.copy_(onednn.dense(grad_before, w1.mT))
                totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
        grad_w2, grad_b2, grad_w1, grad_b1 = totals
        return grad_x, grad_w1.view_as(weight1), grad_b1, grad_w2.view_as(weight2), grad_b2


def takes_norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    return onednn.needs_gradient(x, gate, weight) and not onednn.watched(x) and x.dtype == gate.dtype


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _NormGate.apply(x, gate, weight, bias, eps)


def write_norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Tensor:
    """:func:`norm_gate` without gradients into ``out``, which is contiguous and may be ``x``."""
    for rows, gates, result in onednn.split_rows(x, gate, out):
        torch.mul(F.layer_norm(rows, weight.shape, weight, bias, eps), F.silu(gates), out=result)
    return out


class _NormGate(torch.autograd.Function):
    """Keeps its two inputs; norm and SiLU are repeated in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight, bias)
        ctx.eps = eps
        return write_norm_gate(x, gate, weight, bias, eps, onednn.empty_rows(x))

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, bias = ctx.saved_tensors
        grad_x, grad_gate = onednn.empty_rows(x), onednn.empty_rows(gate)
        totals: list[Tensor] = []
        for rows, gates, grads, result_x, result_gate in onednn.split_rows(x, gate, grad, grad_x, grad_gate):
            if rows.device.type != 'cpu':  # norms elsewhere take one type, and autocast is off in backward
                rows, grads = rows.to(weight.dtype), grads.to(weight.dtype)
            normed, mean, rstd = torch.native_layer_norm(rows, weight.shape, weight, bias, ctx.eps)
            result_gate.copy_(torch.ops.aten.silu_backward((grads * normed).to(gates.dtype), gates))
            of_norm = torch.ops.aten.native_layer_norm_backward(
                grads * F.silu(gates), rows, weight.shape, mean, rstd, weight, bias, [True, True, True]
            )
            result_x.copy_(of_norm[0])
            parts = [onednn.widened(of_norm[1]), onednn.widened(of_norm[2])]
            totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
        return grad_x, grad_gate, totals[0].to(weight.dtype), totals[1].to(bias.dtype), None


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
