"""Cosine transforms of maps along one side, and the damping between those along H: launches of ``transform``'s kernels.

Shapes: maps are (B, H, W, C), decays (H, W, C). Modes of float16 maps are divided by :func:`scale` of each side.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, launch, precision
from vheat_mm.ops.triton.transform import (
    conduct_backward_kernel,
    conduct_kernel,
    damp_backward_kernel,
    transform_kernel,
)

_BASES: OrderedDict[tuple, Tensor] = OrderedDict()
_MAX_BASES = 512  # two per side length seen: 800x1333 detection needs about 120


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
    from vheat_mm.ops.dct import dct_matrix  # which imports the dispatch

    key = (n, inverse, like.dtype, like.device)
    if key in _BASES:
        _BASES.move_to_end(key)
        return _BASES[key]
    side = tiles.padded_side(n)
    matrix = dct_matrix(n, like.dtype)
    padded = matrix.new_zeros(side, side)
    padded[:n, :n] = matrix.mT if inverse else matrix
    _BASES[key] = padded.to(like.device)
    while len(_BASES) > _MAX_BASES:
        _BASES.popitem(last=False)
    return _BASES[key]


def scale(n: int, dtype: torch.dtype) -> float:
    """Power of two that float16 modes of a side of length n are divided by: see ``vheat_mm.ops.reference._scale``."""
    return 2.0 ** math.ceil(math.log2(n) / 2) if dtype is torch.float16 else 1.0
