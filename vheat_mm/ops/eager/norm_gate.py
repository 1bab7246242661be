"""The gated norm of the operator, with less kept for backward than autograd keeps; on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import needs_gradient, once_differentiable, upcast
from vheat_mm.ops.eager import onednn


def _supports(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool | str:
    if not needs_gradient(x, gate, weight):
        return 'no gradient is recorded'
    return (x.dtype, x.shape) == (gate.dtype, gate.shape) or 'map and gate differ in type or shape'


@reference.norm_gate.register('fast', _supports)
def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`vheat_mm.ops.reference.norm_gate`."""
    return _NormGate.apply(x, gate, weight, bias, eps)


def write_norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> Tensor:
    """The same without gradients into ``out``, which is contiguous and may be ``x``."""
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
    @once_differentiable
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
            parts = [upcast(of_norm[1]), upcast(of_norm[2])]
            totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
        return grad_x, grad_gate, totals[0].to(weight.dtype), totals[1].to(bias.dtype), None
