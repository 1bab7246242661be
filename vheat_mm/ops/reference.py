"""The Heat Conduction Operator (HCO) of vHeat, arXiv 2405.16555, Section 3.

An image is taken as the initial temperature of a plate with insulated borders. Its heat equation
``du/dt = k (d2u/dx2 + d2u/dy2)`` is solved in closed form by the cosine transform: mode ``(n, m)`` decays by
``exp(-w k)`` with ``w = (pi n / H)^2 + (pi m / W)^2``, and the diffusivity ``k`` is predicted per mode and channel
from learned frequency value embeddings (FVEs).

Differences from the reference release, none of which changes the function: every map is channels-last, the decay is
``exp(-w k)`` in float32 instead of a power in the autocast type, and the transform's matrices are cached.

Shapes: B batch, H x W map, C channels, N either of H and W. Maps are (B, H, W, C), FVEs and decays (H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vheat_mm.ops.dct import basis, squared_frequencies
from vheat_mm.ops.freq_embed import fit_freq_embed
from vheat_mm.ops.registry import step


@step
def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    """Let heat flow for unit time: IDCT2(decay * DCT2(x)), O(N^1.5 C) for N = H W positions.

    Args:
        x: Initial temperature (B, H, W, C), any floating type.
        decay: Factor of each mode (H, W, C); cast to the type of ``x``.

    Returns:
        Temperature (B, H, W, C), contiguous, in the type of ``x``.
    """
    if x.dtype is torch.float16 and torch.is_grad_enabled() and (x.requires_grad or decay.requires_grad):
        return _Float16Conduction.apply(x, decay)
    # A constant 320 x 320 map has a DC coefficient 320 times its value, which overflows float16.
    scaled = x.dtype is torch.float16
    return _from_modes(_to_modes(x, scaled) * decay.to(x.dtype), scaled)


class _Float16Conduction(torch.autograd.Function):
    """Autograd would transpose the scaled matrices, and multiply gradients by what the modes were divided by.

    Gradients go through the plain matrices instead: a gradient of 205 at each position of a 320 x 320 map passes, as it
    does not through a bias, which sums it, and small ones keep their digits. The decay's gradient, whose products of
    modes leave float16, is summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        modes = _to_modes(x, scaled=True)
        ctx.save_for_backward(decay, modes if ctx.needs_input_grad[1] else None)
        return _from_modes(modes * decay.to(x.dtype), scaled=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError('heat conduction has no second derivative in float16: use float32 or bfloat16')
        decay, modes = ctx.saved_tensors
        grad_modes = _to_modes(grad, scaled=False)
        grad_x = grad_decay = None
        if ctx.needs_input_grad[0]:
            grad_x = _from_modes(grad_modes * decay.to(grad.dtype), scaled=False)
        if ctx.needs_input_grad[1]:
            _, h, w, _ = modes.shape
            summed = (modes * grad_modes.float()).sum(0)
            grad_decay = (summed * (_scale(h) * _scale(w))).to(decay.dtype)
        return grad_x, grad_decay


def _to_modes(x: Tensor, scaled: bool) -> Tensor:
    """DCT2 of (B, H, W, C), over :func:`_scale` of each side if ``scaled``."""
    b, h, w, c = x.shape
    to_h, to_w = (basis(n, x) / _scale(n) if scaled else basis(n, x) for n in (h, w))
    x = torch.bmm(to_w.expand(b * h, w, w), x.reshape(b * h, w, c))  # modes along W
    return torch.bmm(to_h.expand(b, h, h), x.view(b, h, w * c)).view(b, h, w, c)  # modes along H


def _from_modes(modes: Tensor, scaled: bool) -> Tensor:
    """Inverse of :func:`_to_modes`."""
    b, h, w, c = modes.shape
    from_h, from_w = (basis(n, modes).mT * _scale(n) if scaled else basis(n, modes).mT for n in (h, w))
    x = torch.bmm(from_h.expand(b, h, h), modes.view(b, h, w * c))
    return torch.bmm(from_w.expand(b * h, w, w), x.view(b * h, w, c)).view(b, h, w, c)


def _scale(n: int) -> float:
    """A power of two near sqrt(n): exact, and keeps every coefficient within twice the map's maximum."""
    return 2.0 ** math.ceil(math.log2(n) / 2)


@step
def heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(heat_conduction(x, decay)) * SiLU(gate)``: 2 x (B, H, W, C), (H, W, C) -> (B, H, W, C).

    Where no gradient is recorded, a fast form may write over ``x``.
    """
    return by_position(
        lambda gate, heat: norm_gate(heat, gate, weight, bias, eps),
        gate,
        heat_conduction(x, decay),
    )


@step
def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``exp(-w ReLU(freq_embed @ weight^T + bias))``, (H, W, C) -> (H, W, C), in float32 or float64."""
    dtype = torch.promote_types(freq_embed.dtype, torch.float32)
    with torch.autocast(freq_embed.device.type, enabled=False):
        k = F.relu(F.linear(freq_embed.to(dtype), weight.to(dtype), bias.to(dtype)))
        frequencies = squared_frequencies(freq_embed.shape[0], freq_embed.shape[1], dtype, freq_embed.device)
        return torch.exp(-frequencies.unsqueeze(-1) * k)


@step
def decays_of(freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """:func:`decay_map` of each layer for FVEs fitted to a map of ``size``, (H0, W0, C) -> (H, W, C) each."""
    embed = fit_freq_embed(freq_embed, size)
    return [decay_map(embed, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@step
def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a 2-D convolution to a (B, H, W, C) map; both permutations are views."""
    x = x.permute(0, 3, 1, 2)
    if torch.compiler.is_compiling():
        # The compiler chooses layouts itself, and fails on a convolution of a permuted map of symbolic size ("Invalid
        # ranges [0:-1]" of inductor in PyTorch 2.13). It merges this copy into the step before.
        x = x.contiguous()
    return conv(x).permute(0, 2, 3, 1)


@step
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias``: x (..., C), weight (D, C) or of a 1x1 convolution, bias (D,) -> (..., D)."""
    return F.linear(x, weight.flatten(1), bias)


@step
def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`linear` to 2C channels, returned as two halves: x (..., C) -> 2 x (..., C)."""
    first, second = linear(x, weight, bias).chunk(2, dim=-1)
    return first, second


@step
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear maps around an exact GELU: x (..., C), weight1 (D, C), weight2 (C, D) -> (..., C)."""
    return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)


@step
def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * SiLU(gate)``, the end of the operator before its projection: (..., C) -> (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps) * F.silu(gate)


@step
def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual sum ``s = x + gamma * branch`` and ``LayerNorm(s)``: 2 x (..., C) -> 2 x (..., C)."""
    x = x + (branch if gamma is None else gamma * branch)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


@step
def norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Residual sum ``x + gamma * LayerNorm(branch)``: 2 x (..., C) -> (..., C)."""
    branch = F.layer_norm(branch, weight.shape, weight, bias, eps)
    return x + (branch if gamma is None else gamma * branch)


@step
def by_position(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """``function(*maps)`` for a function that treats every position of its maps alike: (..., C) -> (..., C).

    A fast form may call it on some positions at a time. The result may take the memory of the last map.
    """
    return function(*maps)


@step
def by_image(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for a function that treats every image of a batch alike: (B, H, W, C) -> (B, H, W, C)."""
    return function(x)


@step
def embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> Tensor:
    """Image (B, H, W, in_channels) -> map (B, H/4, W/4, C): two 3x3 convolutions of stride 2, a GELU in between."""
    x = F.gelu(norm1(convolve(x, conv1)))
    return norm2(convolve(x, conv2))
