"""Heat conduction, alone and with the norm over channels and the gate behind it.

Both ops work for maps (B, H, W, C) of any size, without copying signal or gate where these are halves of one
(B, H, W, 2C) map, whose memory is also all that backward needs of them: modes and temperature are recomputed.

Forward, the norm and the gate are one kernel with the last transform: a program holds all C channels of its positions,
so that the temperature itself is never written to memory. Backward recomputes the temperature and takes it from
memory: with the gradients of norm and gate, as many channels at once would leave too few registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import once_differentiable
from vheat_mm.ops.library import conduction_flops, custom_op
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, dot, launch, precision, supports
from vheat_mm.ops.triton.cosine import along_height, along_height_backward, along_width, basis, scale


def _supports(x: Tensor, decay: Tensor) -> bool | str:
    if x.ndim != 4 or decay.shape != x.shape[1:]:
        return 'the decay is not of the size of the map'
    return supports(x, decay)


def _supports_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool | str:
    if x.shape[-1] > tiles.MAX_NORM_GATE:
        return f'{x.shape[-1]} channels are more than {tiles.MAX_NORM_GATE}'
    if gate.shape != x.shape or gate.dtype is not x.dtype:
        return 'the gate is not like the map'
    if not weight.shape == bias.shape == x.shape[3:]:
        return 'the norm is of another width'
    answer = _supports(x, decay)
    return supports(x, gate, weight, bias) if answer is True else answer


@reference.heat_conduction.register('triton', _supports, compiled=True)
def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.heat_conduction`."""
    return _heat_conduction(x, decay)


@custom_op('triton_heat_conduction', conduction_flops)
def _heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return along_width(along_height(along_width(x), decay), inverse=True)


@_heat_conduction.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save_conduction(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, decay = inputs
    ctx.save_for_backward(decay, x if ctx.needs_input_grad[1] else None)


@once_differentiable
def _conduction_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    decay, x = ctx.saved_tensors
    needs_x, needs_decay = ctx.needs_input_grad
    some = iter(_heat_conduction_backward(grad, x, decay, needs_x))
    return next(some) if needs_x else None, next(some) if needs_decay else None


@custom_op('triton_heat_conduction_backward')
def _heat_conduction_backward(grad: Tensor, x: Tensor | None, decay: Tensor, needs_x: bool) -> list[Tensor]:
    """The gradient of x where needed, and, given x, that of the decay: heat conduction is linear and self-adjoint."""
    gradients = _conduct_gradients(None if x is None else along_width(x), decay, grad, needs_x)
    return [t for t in gradients if t is not None]


@_heat_conduction_backward.register_fake
def _(grad: Tensor, x: Tensor | None, decay: Tensor, needs_x: bool) -> list[Tensor]:
    maps = [grad.new_empty(grad.shape)] if needs_x else []
    return maps if x is None else [*maps, decay.new_empty(decay.shape)]


_heat_conduction.register_autograd(_conduction_gradients, setup_context=_save_conduction)


@triton.jit
def _inverse(
    x,
    basis,
    basis_row,
    m,
    c,
    size,
    channels,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale * basis @ x`` at the positions m and channels c: basis as in ``transform_kernel``, x (size, channels)."""
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(basis + m[:, None] * basis_row + k[None, :])
        b = tl.load(
            x + k[:, None] * channels + c[None, :], mask=(k < size)[:, None] & (c < channels)[None, :], other=0.0
        )
        acc = dot(a, b, acc, PRECISION)
    return acc * scale


@triton.jit
def norm_gate_kernel(
    x,
    basis,
    gate,
    weight,
    bias,
    out,
    size,
    channels,
    basis_row,
    gate_row,
    scale,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """LayerNorm of ``scale * basis @ x`` over channels, times SiLU(gate), group by group.

    x, out (groups, size, channels); gate the same with rows gate_row apart; weight, bias (channels,).
    """
    tiles = tl.cdiv(size, BLOCK_M)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    mask = (m < size)[:, None] & inside[None, :]
    x += group * size * channels
    gate += group * size * gate_row
    out += group * size * channels
    heat = _inverse(x, basis, basis_row, m, c, size, channels, scale, BLOCK_M, BLOCK_C, BLOCK_K, PRECISION)
    mu = tl.sum(heat, 1) / channels
    normed = tl.where(inside[None, :], heat - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(normed * normed, 1) / channels + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    normed = normed * r[:, None] * w[None, :] + b[None, :]
    g = tl.load(gate + m[:, None] * gate_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
    normed *= g * tl.sigmoid(g)
    tl.store(out + m[:, None] * channels + c[None, :], normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def norm_gate_backward_kernel(
    heat,
    gate,
    grad,
    weight,
    bias,
    grad_heat,
    grad_gate,
    grad_weight,
    grad_bias,
    rows,
    channels,
    gate_row,
    grad_row,
    per_program,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of ``LayerNorm(heat) * SiLU(gate)`` at some positions.

    heat, grad_heat (rows, channels), the same memory if wished; gate, grad the same with rows gate_row and grad_row
    apart; grad_gate (rows, channels); weight, bias (channels,); grad_weight, grad_bias (programs, channels) float32,
    each program's sum. None where not wanted.
    """
    row = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    offsets = row[:, None] * channels + c[None, :]
    # Summed over the tile's rows at the end only: doing it each time would make warps wait for each other.
    by_normed = tl.zeros((ROWS, BLOCK_C), tl.float32)
    plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in range(per_program):
        first = (tl.program_id(0).to(tl.int64) * per_program + i) * ROWS
        mask = (first + row < rows)[:, None] & inside[None, :]
        y = tl.load(heat + first * channels + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + first * gate_row + row[:, None] * gate_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
        # Masked elements of the gradient are 0, and with them everything below.
        dy = tl.load(grad + first * grad_row + row[:, None] * grad_row + c[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        mean = tl.sum(y, 1) / channels
        y = tl.where(inside[None, :], y - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(y * y, 1) / channels + eps)
        y *= rstd[:, None]
        sigmoid = tl.sigmoid(g)
        if grad_gate is not None:
            dg = dy * (y * w[None, :] + b[None, :]) * sigmoid * (1.0 + g * (1.0 - sigmoid))
            tl.store(grad_gate + first * channels + offsets, dg.to(grad_gate.dtype.element_ty), mask=mask)
        dy *= g * sigmoid
        by_normed += dy * y
        plain += dy
        if grad_heat is not None:
            dy *= w[None, :]
            along = tl.sum(dy * y, 1) / channels
            dx = rstd[:, None] * (dy - tl.sum(dy, 1)[:, None] / channels - y * along[:, None])
            tl.store(grad_heat + first * channels + offsets, dx.to(grad_heat.dtype.element_ty), mask=mask)
    sums = tl.program_id(0).to(tl.int64) * channels + c
    if grad_weight is not None:
        tl.store(grad_weight + sums, tl.sum(by_normed, 0), mask=inside)
    if grad_bias is not None:
        tl.store(grad_bias + sums, tl.sum(plain, 0), mask=inside)


@reference.heat_norm_gate_.register('triton', _supports_norm_gate, compiled=True)
def heat_norm_gate_(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`vheat_mm.ops.reference.heat_norm_gate_`; leaves ``x`` as it is."""
    return _heat_norm_gate(x, gate, decay, weight, bias, eps)


@custom_op('triton_heat_norm_gate', conduction_flops)
def _heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _launch_norm_gate(x, gate, decay, weight, bias, eps)


@_heat_norm_gate.register_fake
def _(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _save_norm_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Saves inputs only."""
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _norm_gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, decay, weight, bias = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    some = iter(_heat_norm_gate_backward(grad, x, gate, decay, weight, bias, ctx.eps, needs))
    return (*(next(some) if need else None for need in needs), None)


@custom_op('triton_heat_norm_gate_backward')
def _heat_norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool]
) -> list[Tensor]:
    """Those needed of the gradients of x, gate, decay, weight, bias."""
    needs_x, needs_gate, needs_decay, needs_weight, needs_bias = needs
    row_modes = along_width(x)
    # Modes of rows are needed again for the gradient of the decay, and may be overwritten otherwise.
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
        *(x.numel() // channels, channels, gate_row, grad_row, per_program, eps),
        **tile,
    )
    grad_x = grad_decay = None
    if grad_heat is not None:
        grad_x, grad_decay = _conduct_gradients(row_modes if needs_decay else None, decay, grad_heat, needs_x)
    grad_weight = None if grad_weight is None else grad_weight.sum(0).to(weight.dtype)
    grad_bias = None if grad_bias is None else grad_bias.sum(0).to(bias.dtype)
    return [t for t in (grad_x, grad_gate, grad_decay, grad_weight, grad_bias) if t is not None]


@_heat_norm_gate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool]
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip((x, gate, decay, weight, bias), needs, strict=True) if need]


_heat_norm_gate.register_autograd(_norm_gate_gradients, setup_context=_save_norm_gate)


def _launch_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
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


def _conduct_gradients(
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
