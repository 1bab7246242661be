"""Cosine transforms of maps along one side, and the damping between those along H.

The operator is a product with a cosine basis along W, one along H, the damping, and the two products back. Along W and
back are kernels of their own, since a program would have to hold a whole map to do all four. Along H, damping and back
along H stay on the chip.

Shapes: maps are (B, H, W, C), decays (H, W, C). Float16: modes of a constant map grow with its sides, so they are
divided by :func:`scale` of each side, a power of two, which is 1 for other types. Bases are padded with zeros to whole
tiles, so that their loads are wide and need no masks. Offsets between groups and images are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vheat_mm.ops.dct import kept_basis
from vheat_mm.ops.reference import float16_scale
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, dot, launch, precision


@triton.jit
def transform_kernel(
    x,
    basis,
    decay,
    out,
    size,
    columns,
    x_group,
    x_row,
    basis_row,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale * basis @ x``, times ``decay`` where given, group by group.

    x: groups of (size, columns) whose groups and rows lie x_group and x_row apart; basis (size, size), padded, with
    rows basis_row apart; decay (size, columns) or None; out (groups, size, columns). A program makes a tile of one
    group.
    """
    tiles_m = tl.cdiv(size, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    group = (pid // (tiles_m * tiles_n)).to(tl.int64)
    # Programs that read the same columns run side by side and share them in the cache.
    m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x += group * x_group
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(basis + m[:, None] * basis_row + k[None, :])
        b = tl.load(x + k[:, None] * x_row + n[None, :], mask=(k < size)[:, None] & (n < columns)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    acc *= scale
    mask = (m < size)[:, None] & (n < columns)[None, :]
    offsets = m[:, None] * columns + n[None, :]
    if decay is not None:
        acc *= tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + group * size * columns + offsets, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conduct_kernel(
    x,
    basis,
    decay,
    out,
    batch,
    size,
    columns,
    scale,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``basis^T @ (decay * (basis @ x))`` of each image.

    x, out (batch, size, columns), the same memory if wished; basis (size, size), padded to
    (BLOCK_H, BLOCK_H); decay (size, columns). A program makes whole columns of one image.
    """
    pid = tl.program_id(0)
    image = (pid % batch).to(tl.int64) * size * columns  # programs that share decays run side by side
    h = tl.arange(0, BLOCK_H)
    n = pid // batch * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = h[:, None] * columns + n[None, :]
    mask = (h < size)[:, None] & (n < columns)[None, :]
    a = tl.load(basis + h[:, None] * BLOCK_H + h[None, :])
    positions = tl.load(x + image + offsets, mask=mask, other=0.0)
    zero = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    modes = dot(a, positions, zero, PRECISION) * scale
    modes *= tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32)
    heat = dot(tl.trans(a), modes.to(a.dtype), zero, PRECISION) * (1.0 / scale)
    tl.store(out + image + offsets, heat.to(out.dtype.element_ty), mask=mask)


@triton.jit
def conduct_backward_kernel(
    x,
    grad,
    basis,
    decay,
    out,
    partial,
    batch,
    size,
    columns,
    chunk,
    scale,
    correction,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What :func:`conduct_kernel` does, of ``grad``, and the decay's gradient: products of modes, summed over images.

    x, grad, out (batch, size, columns), out None where not wanted, or grad's memory; partial (chunks, size, columns)
    float32. A program does the same columns of ``chunk`` images, one after the other.
    """
    tiles = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // tiles * chunk
    h = tl.arange(0, BLOCK_H)
    n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = h[:, None] * columns + n[None, :]
    mask = (h < size)[:, None] & (n < columns)[None, :]
    a = tl.load(basis + h[:, None] * BLOCK_H + h[None, :])
    zero = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    acc = zero
    for i in range(tl.minimum(chunk, batch - first)):
        image = (first + i).to(tl.int64) * size * columns
        modes = dot(a, tl.load(x + image + offsets, mask=mask, other=0.0), zero, PRECISION) * scale
        grad_modes = dot(a, tl.load(grad + image + offsets, mask=mask, other=0.0), zero, PRECISION) * scale
        acc += modes * grad_modes
        if out is not None:
            grad_modes *= tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32)
            heat = dot(tl.trans(a), grad_modes.to(a.dtype), zero, PRECISION) * (1.0 / scale)
            tl.store(out + image + offsets, heat.to(out.dtype.element_ty), mask=mask)
    tl.store(partial + (pid // tiles).to(tl.int64) * size * columns + offsets, acc * correction, mask=mask)


@triton.jit
def damp_backward_kernel(x, grad, decay, out, batch, modes, correction, DAMP: tl.constexpr, BLOCK: tl.constexpr):
    """The decay's gradient and, where DAMP, the damped gradient, for sides too long for the kernel above.

    x, grad (batch, modes), grad damped in place; decay (modes,); out (modes,) float32.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < modes
    factor = tl.load(decay + offsets, mask=mask, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(batch):
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * g
        if DAMP:
            tl.store(grad + offsets, (g * factor).to(grad.dtype.element_ty), mask=mask)
        x += modes
        grad += modes
    tl.store(out + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), acc * correction, mask=mask)


def along_width(x: Tensor, inverse: bool = False) -> Tensor:
    """DCT along W or its inverse, (B, H, W, C) -> (B, H, W, C) contiguous."""
    b, h, w, c = x.shape
    x, row = as_rows(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _transform(x, out, None, (b * h, w, c), (w * row, row), inverse)
    return out


def along_height(x: Tensor, decay: Tensor, keep: bool = False) -> Tensor:
    """DCT along H, damping and inverse, (B, H, W, C) -> (B, H, W, C); overwrites ``x`` unless it is to be kept."""
    b, h, w, c = x.shape
    decay = decay.contiguous()
    out = torch.empty_like(x) if keep else x
    if h > tiles.MAX_FUSED[x.dtype]:
        modes = torch.empty_like(x)
        _transform(x, modes, decay, (b, h, w * c), (h * w * c, w * c), inverse=False)
        _transform(modes, out, None, (b, h, w * c), (h * w * c, w * c), inverse=True)
        return out
    tile = tiles.conduct(h, w * c, x.dtype, backward=False)
    launch(
        conduct_kernel,
        b * tiles.ceil_div(w * c, tile['BLOCK_N']),
        x,
        *(x, basis(h, x, inverse=False), decay, out, b, h, w * c, 1 / scale(h, x.dtype)),
        PRECISION=precision(x.dtype),
        **tile,
    )
    return out


def along_height_backward(x: Tensor, grad: Tensor, decay: Tensor, needs_x: bool) -> tuple[Tensor, Tensor]:
    """:func:`along_height` of ``grad`` where wanted, in its memory, and the decay's gradient (H, W, C)."""
    b, h, w, c = x.shape
    decay_type, decay = decay.dtype, decay.contiguous()
    # Modes are stored divided by the scales of both sides.
    correction = (scale(h, x.dtype) * scale(w, x.dtype)) ** 2
    if h > tiles.MAX_FUSED[x.dtype]:
        shape, strides = (b, h, w * c), (h * w * c, w * c)
        x_modes, modes = torch.empty_like(x), torch.empty_like(grad)
        _transform(x, x_modes, None, shape, strides, inverse=False)
        _transform(grad, modes, None, shape, strides, inverse=False)
        total = torch.empty(h, w, c, dtype=torch.float32, device=x.device)
        launch(
            damp_backward_kernel,
            tiles.ceil_div(h * w * c, 1024),
            x,
            *(x_modes, modes, decay, total, b, h * w * c, correction),
            DAMP=needs_x,
            BLOCK=1024,
            num_warps=4,
        )
        if needs_x:
            _transform(modes, grad, None, shape, strides, inverse=True)
        return grad, total.to(decay_type)
    tile = tiles.conduct(h, w * c, x.dtype, backward=True)
    columns = tiles.ceil_div(w * c, tile['BLOCK_N'])
    chunk = tiles.ceil_div(b, tiles.ceil_div(tiles.PARTIAL_SUMS, columns))
    chunks = tiles.ceil_div(b, chunk)
    partial = torch.empty(chunks, h, w, c, dtype=torch.float32, device=x.device)
    launch(
        conduct_backward_kernel,
        chunks * columns,
        x,
        *(x, grad, basis(h, x, inverse=False), decay, grad if needs_x else None, partial),
        *(b, h, w * c, chunk, 1 / scale(h, x.dtype), correction),
        PRECISION=precision(x.dtype),
        **tile,
    )
    return grad, (partial[0] if chunks == 1 else partial.sum(0)).to(decay_type)


def _transform(
    x: Tensor, out: Tensor, decay: Tensor | None, shape: tuple[int, int, int], strides: tuple[int, int], inverse: bool
) -> None:
    """DCT or its inverse of (groups, size, columns) along size, damped where there is a decay (size, columns)."""
    groups, size, columns = shape
    factor = scale(size, x.dtype)
    tile, matrix = tiles.transform(size, columns, x.dtype), basis(size, x, inverse)
    launch(
        transform_kernel,
        groups * tiles.ceil_div(size, tile['BLOCK_M']) * tiles.ceil_div(columns, tile['BLOCK_N']),
        x,
        *(x, matrix, decay, out, size, columns, *strides, matrix.shape[1], factor if inverse else 1 / factor),
        PRECISION=precision(x.dtype),
        **tile,
    )


def basis(n: int, like: Tensor, inverse: bool) -> Tensor:
    """Cosine basis (n, n) or its inverse in the type of ``like``, padded with zeros to whole tiles; computed once."""
    return kept_basis(n, like.dtype, like.device, inverse, tiles.padded_side(n))


def scale(n: int, dtype: torch.dtype) -> float:
    """Power of two that float16 modes of a side of length n are divided by; 1 for other types."""
    return float16_scale(n) if dtype is torch.float16 else 1.0
