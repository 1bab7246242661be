"""Heat conduction through Triton kernels, alone and with the norm and gate behind it.

Both steps work for maps (B, H, W, C) of any size, without copying signal or gate where these are halves of one
(B, H, W, 2C) map, whose memory is also all that backward needs of them: modes and temperature are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vheat_mm.ops.autograd import once
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, eager, launch, needs_gradient, precision, runs
from vheat_mm.ops.triton.cosine import along_height, along_height_backward, along_width, basis, scale
from vheat_mm.ops.triton.norm_gate import norm_gate_backward_kernel, norm_gate_kernel


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    return x.ndim == 4 and decay.shape == x.shape[1:] and runs(x, decay)


@eager
def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    """IDCT2(decay * DCT2(x)): x (B, H, W, C), decay (H, W, C) -> (B, H, W, C) in the type of ``x``, contiguous."""
    if needs_gradient(x, decay):
        return _HeatConduction.apply(x, decay)
    return _heat_conduction(x, decay)


def takes_heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    return (
        takes_heat_conduction(x, decay)
        and x.shape[3] <= tiles.MAX_NORM_GATE
        and gate.shape == x.shape
        and gate.dtype is x.dtype
        and weight.shape == bias.shape == x.shape[3:]
        and runs(x, gate, weight, bias)
    )


@eager
def heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(heat_conduction(x, decay)) * SiLU(gate)``, the operator up to its projection.

    Args:
        x: Signal (B, H, W, C).
        gate: Gate (B, H, W, C), in the type of ``x``.
        decay: Factor of each mode (H, W, C).
        weight: Of the norm over channels (C,).
        bias: Of the norm (C,).
        eps: Added to the norm's variance.

    Returns:
        Map (B, H, W, C) in the type of ``x``, contiguous.
    """
    if needs_gradient(x, gate, decay, weight, bias):
        return _HeatNormGate.apply(x, gate, decay, weight, bias, eps)
    return _heat_norm_gate(x, gate, decay, weight, bias, eps)


class _HeatConduction(torch.autograd.Function):
    """Linear and self-adjoint in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        ctx.save_for_backward(decay, x if ctx.needs_input_grad[1] else None)
        return _heat_conduction(x, decay)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        decay, x = ctx.saved_tensors
        modes = None if x is None else along_width(x)
        return _gradients(modes, decay, grad, ctx.needs_input_grad[0])


class _HeatNormGate(torch.autograd.Function):
    """Saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, decay, weight, bias)
        ctx.eps = eps
        return _heat_norm_gate(x, gate, decay, weight, bias, eps)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, decay, weight, bias = ctx.saved_tensors
        needs_x, needs_gate, needs_decay, needs_weight, needs_bias, _ = ctx.needs_input_grad
        row_modes = along_width(x)
        # Rows' modes are needed again for the decay's gradient, and may be overwritten otherwise.
        heat = along_width(along_height(row_modes, decay, keep=needs_decay), inverse=True)
        channels = x.shape[3]
        tile, programs, per_program = tiles.norm_backward(channels, x.numel() // channels)
        grad_heat = heat if needs_x or needs_decay else None
        grad_gate = torch.empty_like(heat) if needs_gate else None
        grad_weight, grad_bias = (
            torch.empty(programs, channels, dtype=torch.float32, device=x.device) if needed else None
            for needed in (needs_weight, needs_bias)
        )
        gate, gate_row = as_rows(gate)
        grad, grad_row = as_rows(grad)
        launch(
            norm_gate_backward_kernel,
            programs,
            x,
            *(heat, gate, grad, weight.contiguous(), bias.contiguous(), grad_heat, grad_gate, grad_weight, grad_bias),
            *(x.numel() // channels, channels, gate_row, grad_row, per_program, ctx.eps),
            **tile,
        )
        grad_x = grad_decay = None
        if grad_heat is not None:
            grad_x, grad_decay = _gradients(row_modes if needs_decay else None, decay, grad_heat, needs_x)
        return (
            grad_x,
            grad_gate,
            grad_decay,
            None if grad_weight is None else grad_weight.sum(0).to(weight.dtype),
            None if grad_bias is None else grad_bias.sum(0).to(bias.dtype),
            None,
        )


def _heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return along_width(along_height(along_width(x), decay), inverse=True)


def _heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    b, h, w, c = x.shape
    modes = along_height(along_width(x), decay)
    gate, gate_row = as_rows(gate)
    out = torch.empty_like(modes)
    tile, matrix = tiles.norm_gate(w, c, x.dtype), basis(w, x, inverse=True)
    launch(
        norm_gate_kernel,
        b * h * tiles.ceil_div(w, tile['BLOCK_M']),
        x,
        *(modes, matrix, gate, weight.contiguous(), bias.contiguous(), out),
        *(w, c, matrix.shape[1], gate_row, scale(w, x.dtype), eps),
        PRECISION=precision(x.dtype),
        **tile,
    )
    return out


def _gradients(
    row_modes: Tensor | None, decay: Tensor, grad: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of heat conduction for x and, given DCT_W(x), for the decay; maps (B, H, W, C), decay (H, W, C)."""
    modes = along_width(grad)
    grad_decay = None
    if row_modes is None:
        modes = along_height(modes, decay)
    else:
        modes, grad_decay = along_height_backward(row_modes, modes, decay, needs_x)
    return (along_width(modes, inverse=True) if needs_x else None), grad_decay
