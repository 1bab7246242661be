"""The norm over channels and the gate behind heat conduction, forward and backward.

Forward is one kernel with the last transform: a program holds all C channels of its positions, so that the temperature
itself is never written to memory. Backward recomputes the temperature and takes it from memory: with the gradients of
norm and gate, as many channels at once would leave too few registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vheat_mm.ops.triton.common import dot


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
