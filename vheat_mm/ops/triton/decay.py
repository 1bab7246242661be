"""Decay maps: the linear map, ReLU, frequencies and exponential in one kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import once_differentiable
from vheat_mm.ops.library import custom_op
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import dot, launch, precision, supports


def _supports(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> bool | str:
    if freq_embed.ndim != 3 or weight.ndim != 2 or freq_embed.shape[2:] != weight.shape[1:]:
        return 'FVEs and weight do not fit'
    if bias.shape != weight.shape[:1]:
        return 'weight and bias do not fit'
    return supports(freq_embed, weight, bias)


@triton.jit
def decay_kernel(
    freq_embed,
    weight,
    bias,
    grad,
    out,
    rows,
    width,
    channels_in,
    channels,
    per_row,
    per_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Decays of some modes and channels, or the gradient of ``freq_embed @ weight^T + bias`` where there is a grad.

    freq_embed (rows, channels_in), of which row n W + m is mode (n, m) of frequency (per_row n)^2 + (per_column m)^2;
    weight (channels, channels_in); bias (channels,); grad, out (rows, channels) float32.
    """
    tiles_n = tl.cdiv(channels, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, channels_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            freq_embed + m[:, None] * channels_in + k[None, :],
            mask=(m < rows)[:, None] & (k < channels_in)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + n[None, :] * channels_in + k[:, None],
            mask=(n < channels)[None, :] & (k < channels_in)[:, None],
            other=0.0,
        )
        acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    acc += tl.load(bias + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    y = (m // width).to(tl.float32) * per_row
    x = (m % width).to(tl.float32) * per_column
    frequency = (y * y + x * x)[:, None]
    result = tl.exp(-frequency * tl.maximum(acc, 0.0))
    offsets = m[:, None] * channels + n[None, :]
    mask = (m < rows)[:, None] & (n < channels)[None, :]
    if grad is not None:
        dy = tl.load(grad + offsets, mask=mask, other=0.0)
        # Where w k is too small to move exp from 1, the gradient is not zero: the sign of k decides, not the decay.
        result = tl.where(acc > 0.0, -frequency * result * dy, 0.0)
    tl.store(out + offsets, result, mask=mask)


@reference.decay_map.register('triton', _supports, compiled=True)
def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.decay_map`; in float32 whatever the types."""
    return _decay_map(freq_embed, weight, bias)


@custom_op('triton_decay_map')
def _decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _launch(freq_embed, weight, bias, None)


@_decay_map.register_fake
def _(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return freq_embed.new_empty(*freq_embed.shape[:2], weight.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """Saves the inputs, which are parameters, and none of the maps."""
    ctx.save_for_backward(*inputs)


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    freq_embed, weight, bias = ctx.saved_tensors
    needs_embed, needs_weight, needs_bias = ctx.needs_input_grad
    grad = _decay_map_backward(grad, freq_embed, weight, bias).flatten(0, 1)
    with torch.autocast(grad.device.type, enabled=False):
        grad_embed = (grad @ weight.float()).view(freq_embed.shape).to(freq_embed.dtype) if needs_embed else None
        grad_weight = (grad.T @ freq_embed.flatten(0, 1).float()).to(weight.dtype) if needs_weight else None
    return grad_embed, grad_weight, grad.sum(0).to(bias.dtype) if needs_bias else None


@custom_op('triton_decay_map_backward')
def _decay_map_backward(grad: Tensor, freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gradient of ``freq_embed @ weight^T + bias`` (H, W, D), in float32."""
    return _launch(freq_embed, weight, bias, grad.contiguous())


@_decay_map_backward.register_fake
def _(grad: Tensor, freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return grad.new_empty(grad.shape, dtype=torch.float32)


_decay_map.register_autograd(_gradients, setup_context=_save)


def _launch(freq_embed: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None) -> Tensor:
    h, w, channels_in = freq_embed.shape
    channels = weight.shape[0]
    out = torch.empty(h, w, channels, dtype=torch.float32, device=freq_embed.device)
    tile = tiles.linear(channels)
    launch(
        decay_kernel,
        tiles.ceil_div(h * w, tile['BLOCK_M']) * tiles.ceil_div(channels, tile['BLOCK_N']),
        freq_embed,
        *(freq_embed.contiguous(), weight.contiguous(), bias.contiguous(), grad, out),
        *(h * w, w, channels_in, channels, math.pi / h, math.pi / w),
        PRECISION=precision(torch.float32),
        **tile,
    )
    return out
