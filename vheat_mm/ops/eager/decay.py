"""Decay maps: kept at inference on the CPU, and with less kept for backward in training on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vheat_mm.ops import decay_cache, reference
from vheat_mm.ops.autograd import compute_dtype, needs_gradient, once_differentiable, without_autocast
from vheat_mm.ops.dct import frequencies_of
from vheat_mm.ops.eager import onednn
from vheat_mm.ops.library import custom_op

Size = tuple[int, int]


def _supports_kept(
    freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], size: Size, dtype: torch.dtype, cache: Tensor
) -> bool | str:
    if freq_embed.device.type != 'cpu':
        return 'comparing the contents of weights would wait for the GPU'
    if needs_gradient(freq_embed, *weights, *biases):
        return 'a gradient is recorded'
    return True


@reference.decay_maps.register('fast', _supports_kept, compiled=True)
def decay_maps(
    freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], size: Size, dtype: torch.dtype, cache: Tensor
) -> list[Tensor]:
    """See :func:`vheat_mm.ops.reference.decay_maps`; kept while the contents of all weights are the same."""
    if torch.compiler.is_compiling():
        return _decay_maps(freq_embed, weights, biases, *size, dtype, cache)
    return decay_cache.fetch(
        cache,
        (size, dtype, freq_embed.shape, len(weights)),
        [freq_embed, *weights, *biases],
        lambda: reference.decay_maps.reference(freq_embed, weights, biases, size, dtype, cache),
    )


@custom_op('decay_maps')
def _decay_maps(
    freq_embed: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    height: int,
    width: int,
    dtype: torch.dtype,
    cache: Tensor,
) -> list[Tensor]:
    kept = decay_maps(freq_embed, weights, biases, (height, width), dtype, cache)
    return [decay.clone() for decay in kept]  # the graph may write into what it is given


@_decay_maps.register_fake
def _(
    freq_embed: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    height: int,
    width: int,
    dtype: torch.dtype,
    cache: Tensor,
) -> list[Tensor]:
    return [freq_embed.new_empty(height, width, freq_embed.shape[2], dtype=dtype) for _ in weights]


def _supports_training(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> bool | str:
    if not needs_gradient(freq_embed, weight, bias):
        return 'no gradient is recorded'
    if freq_embed.device != weight.device:
        return f'the FVEs are on {freq_embed.device}, the weights on {weight.device}'
    return freq_embed.dtype is torch.float32 or f'the FVEs are {freq_embed.dtype}'


@reference.decay_map.register('fast', _supports_training)
def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.decay_map`."""
    # Not float16: gradients summed over all modes leave its range.
    dtype = torch.bfloat16 if compute_dtype(freq_embed) is torch.bfloat16 else torch.float32
    return _DecayMap.apply(freq_embed, weight.float(), bias.float(), dtype)


class _DecayMap(torch.autograd.Function):
    """Keeps the decay, which the operator keeps as well, and where the diffusivity is positive.

    The decay is made in float32 under autocast too; products of its gradients are in the type of autocast, as others.
    """

    @staticmethod
    def forward(ctx: Any, freq_embed: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        with without_autocast(freq_embed):
            k = onednn.dense(freq_embed, weight, bias).relu_()
            active = k > 0
        decay = k.mul_(-frequencies_of(k)).exp_()
        ctx.save_for_backward(freq_embed, weight, decay, active)
        ctx.dtype = dtype
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        freq_embed, weight, decay, active = ctx.saved_tensors
        h, w, c = freq_embed.shape
        with without_autocast(grad):
            grad_k = (grad * decay).mul_(-frequencies_of(grad))
            grad_k, embeds, weight = (t.to(ctx.dtype) for t in (grad_k.mul_(active).view(-1, c), freq_embed, weight))
            grad_weight, grad_bias = onednn.weight_gradient(grad_k, embeds.reshape(-1, c))
            grad_embed = onednn.dense(grad_k, weight.mT).to(freq_embed.dtype)
            return grad_embed.view(h, w, c), grad_weight, grad_bias, None
