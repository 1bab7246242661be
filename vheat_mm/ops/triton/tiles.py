"""Sizes of the tiles that one program works on, and its warps.

Chosen from the problem's sizes alone: timing candidates at run time would break CUDA graphs and make results depend on
the noise of autotuning. Every choice fits the 99 KiB of shared memory that GPUs from compute capability 8.6 on have.
Products need sides of at least 16, and ranges are powers of two: smaller and other sizes are padded by masks.
"""

from __future__ import annotations

import torch
from triton import next_power_of_2

# Longest side whose transform, damping and inverse one program does without leaving the chip. Longer ones are split:
# the basis alone would fill the shared memory or, of float32 without tensor cores, the registers.
MAX_FUSED = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
# Padded side -> columns and warps of those programs, then the same of the backward. As many as leave registers for 16
# warps on a multiprocessor, so that some load while others compute (compiled for sm_90).
_CONDUCT = {16: (128, 4, 64, 4), 32: (64, 4, 64, 8), 64: (64, 4, 32, 4), 128: (64, 8, 32, 8)}
_CONDUCT_FLOAT32 = {16: (64, 4, 32, 4), 32: (32, 4, 32, 8), 64: (16, 8, 16, 8)}
# Most channels whose norm is part of the inverse transform: a program holds all channels of 16 positions.
MAX_NORM_GATE = 1024
MAX_NORM = 2048
# Programs that each sum the gradients of a norm's parameters over their rows: a few per multiprocessor.
PARTIAL_SUMS = 512


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def padded_side(size: int) -> int:
    """Side of a basis of this size, a multiple of the tiles that it is read in."""
    return _padded(size, 128) if size <= 128 else ceil_div(size, 128) * 128


def _padded(n: int, most: int) -> int:
    return min(max(next_power_of_2(n), 16), most)


def _columns(n: int, most: int) -> int:
    """Width of a tile of n columns: half of ``most`` where that wastes fewer."""
    half = most // 2
    return half if n > half and ceil_div(n, half) * half < ceil_div(n, most) * most else _padded(n, most)


def transform(size: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of a (size, size) @ (size, columns) product."""
    wide = dtype is torch.float32
    m = _padded(size, 128)
    if m == 128 and (wide or ceil_div(size, 64) * 64 < ceil_div(size, 128) * 128):
        m = 64
    n = _columns(columns, 64 if wide else 128)
    k = _padded(size, 32 if wide else 64)
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=_warps(m * n), num_stages=1 if size <= k else 3)


def conduct(size: int, columns: int, dtype: torch.dtype, backward: bool) -> dict[str, int]:
    """Tiles of a whole side: (size, size) @ (size, columns), and the same back."""
    h = _padded(size, 128)
    choice = (_CONDUCT_FLOAT32 if dtype is torch.float32 else _CONDUCT)[h]
    most, warps = choice[2:] if backward else choice[:2]
    return dict(BLOCK_H=h, BLOCK_N=_padded(columns, most), num_warps=warps, num_stages=1)


def norm_gate(size: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of an inverse transform whose programs see all channels of their positions."""
    c = _padded(channels, MAX_NORM_GATE)
    m = _padded(size, max(16, min(64, 8192 // c)))
    k = _padded(size, max(16, min(64, (8192 if dtype is torch.float32 else 16384) // c)))
    return dict(BLOCK_M=m, BLOCK_C=c, BLOCK_K=k, num_warps=_warps(2 * m * c), num_stages=1 if size <= k else 2)


def norm(channels: int) -> dict[str, int]:
    """Tiles of whole rows of channels."""
    c = _padded(channels, MAX_NORM)
    rows = max(1, min(32, 2048 // c))
    return dict(ROWS=rows, BLOCK_C=c, num_warps=4)


def norm_backward(channels: int, rows: int) -> tuple[dict[str, int], int, int]:
    """Tiles of whole rows, programs, and tiles that each program works off."""
    tile = norm(channels)
    tile['ROWS'] = max(1, tile['ROWS'] // 2)  # their sums take registers
    blocks = ceil_div(rows, tile['ROWS'])
    per_program = ceil_div(blocks, PARTIAL_SUMS)
    return tile, ceil_div(blocks, per_program), per_program


def linear(channels: int) -> dict[str, int]:
    """Tiles of a (rows, channels) @ (channels, channels) product in float32."""
    n = _padded(channels, 64)
    return dict(BLOCK_M=64, BLOCK_N=n, BLOCK_K=_padded(channels, 32), num_warps=4, num_stages=2)


def _warps(elements: int) -> int:
    """Warps for a tile of float32 accumulators: 32 registers of each thread, more of large tiles."""
    return max(4, min(16, elements // 1024))
