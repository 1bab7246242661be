"""The mathematics of vHeat, arXiv 2405.16555, Section 3, in plain PyTorch: the reference of every op.

An image is taken as the initial temperature of a plate with insulated borders. Its heat equation
``du/dt = k (d2u/dx2 + d2u/dy2)`` is solved in closed form by the cosine transform: mode ``(n, m)`` decays by
``exp(-w k)`` with ``w = (pi n / H)^2 + (pi m / W)^2``, and the diffusivity ``k`` is predicted per mode and channel
from learned frequency value embeddings (FVEs).

Differences from the reference release, none of which changes the function: maps are channels-last, the decay is
``exp(-w k)`` in float32 instead of a power in the type of autocast, and the matrices of the transform are kept.

Shapes: B batch, H x W map, C channels, N either of H and W. Maps are (B, H, W, C), FVEs and decays (H, W, C).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops.autograd import upcast, without_autocast
from vheat_mm.ops.dct import dct_basis, frequencies_of
from vheat_mm.ops.freq_embed import resize_freq_embed
from vheat_mm.ops.registry import Op

Pair = tuple[int, ...]


@Op
def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    """Let heat flow for unit time: IDCT2(decay * DCT2(x)), O(N^1.5 C) for N = H W positions (Eq. 8 of the paper).

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
    return _idct2(_dct2(x, scaled) * decay.to(x.dtype), scaled)


def _dct2(x: Tensor, scaled: bool) -> Tensor:
    """DCT2 of (B, H, W, C), divided by :func:`float16_scale` of each side if ``scaled``."""
    b, h, w, c = x.shape
    to_h, to_w = (dct_basis(n, x) / float16_scale(n) if scaled else dct_basis(n, x) for n in (h, w))
    x = torch.bmm(to_w.expand(b * h, w, w), x.reshape(b * h, w, c))  # modes along W
    return torch.bmm(to_h.expand(b, h, h), x.view(b, h, w * c)).view(b, h, w, c)  # modes along H


def _idct2(modes: Tensor, scaled: bool) -> Tensor:
    """Inverse of :func:`_dct2`."""
    b, h, w, c = modes.shape
    from_h, from_w = (dct_basis(n, modes).mT * (float16_scale(n) if scaled else 1) for n in (h, w))
    x = torch.bmm(from_h.expand(b, h, h), modes.reshape(b, h, w * c))
    return torch.bmm(from_w.expand(b * h, w, w), x.view(b * h, w, c)).view(b, h, w, c)


def float16_scale(n: int) -> float:
    """A power of two near sqrt(n): exact, and keeps every coefficient within twice the maximum of the map."""
    return 2.0 ** math.ceil(math.log2(n) / 2)


class _Float16Conduction(torch.autograd.Function):
    """Autograd would transpose the scaled matrices, and multiply gradients by what the modes were divided by.

    Gradients go through the plain matrices instead, so that they keep their digits and stay within float16. The
    gradient of the decay, whose products of modes leave float16, is summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        modes = _dct2(x, scaled=True)
        ctx.save_for_backward(decay, modes if ctx.needs_input_grad[1] else None)
        return _idct2(modes * decay.to(x.dtype), scaled=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError('heat conduction has no second derivative in float16: use float32 or bfloat16')
        decay, modes = ctx.saved_tensors
        grad_modes = _dct2(grad, scaled=False)
        grad_x = grad_decay = None
        if ctx.needs_input_grad[0]:
            grad_x = _idct2(grad_modes * decay.to(grad.dtype), scaled=False)
        if ctx.needs_input_grad[1]:
            _, h, w, _ = modes.shape
            summed = (modes * grad_modes.float()).sum(0)
            grad_decay = (summed * (float16_scale(h) * float16_scale(w))).to(decay.dtype)
        return grad_x, grad_decay


def decay_of(k: Tensor) -> Tensor:
    """``exp(-w k)`` of a diffusivity k (H, W, C), in float32 or float64: a half type would lose ``w k``."""
    k = upcast(k)
    return torch.exp(-frequencies_of(k) * k)


@Op
def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``exp(-w ReLU(freq_embed @ weight^T + bias))``, (H, W, C) -> (H, W, C), in float32 or float64."""
    with without_autocast(freq_embed):
        return decay_of(F.relu(F.linear(upcast(freq_embed), upcast(weight), upcast(bias))))


@Op
def fit_freq_embed(freq_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """FVEs (H, W, C) for a map of ``size``, as the network uses them: bicubic, (H', W', C) contiguous."""
    return resize_freq_embed(freq_embed, size, mode='bicubic').contiguous()


@Op
def decay_maps(
    freq_embed: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    size: tuple[int, int],
    dtype: torch.dtype,
    cache: Tensor,
) -> list[Tensor]:
    """:func:`decay_map` of each layer of a stage for FVEs fitted to a map of ``size``, in ``dtype``.

    ``cache`` is the ``handle`` of the :class:`~vheat_mm.ops.decay_cache.DecayCache` that a kernel may keep them in.
    """
    embed = fit_freq_embed(freq_embed, size)
    return [decay_map(embed, weight, bias).to(dtype) for weight, bias in zip(weights, biases, strict=True)]


@Op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias``: x (..., C), weight (D, C) or of a 1x1 convolution, bias (D,) -> (..., D)."""
    return F.linear(x, weight.flatten(1), bias)


@Op
def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`linear` to 2C channels, returned as two halves: x (..., C) -> 2 x (..., C)."""
    first, second = linear(x, weight, bias).chunk(2, dim=-1)
    return first, second


@Op
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear maps around an exact GELU: x (..., C), weight1 (D, C), weight2 (C, D) -> (..., C)."""
    return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)


@Op
def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * SiLU(gate)``, the end of the operator before its projection: 2 x (..., C) -> (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps) * F.silu(gate)


@Op
def heat_norm_gate_(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(heat_conduction(x, decay)) * SiLU(gate)``: 2 x (B, H, W, C), (H, W, C) -> (B, H, W, C).

    The caller gives ``x`` up: where no gradient is recorded, the result may take its memory.
    """
    return norm_gate(heat_conduction(x, decay), gate, weight, bias, eps)


@Op
def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual sum ``s = x + gamma * branch`` and ``LayerNorm(s)``: 2 x (..., C) -> 2 x (..., C)."""
    x = x + (branch if gamma is None else gamma * branch)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


@Op
def norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Residual sum ``x + gamma * LayerNorm(branch)``: 2 x (..., C) -> (..., C)."""
    branch = F.layer_norm(branch, weight.shape, weight, bias, eps)
    return x + (branch if gamma is None else gamma * branch)


@Op
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """2-D convolution of a (B, H, W, C) map; both permutations are views."""
    return F.conv2d(channels_first(x), weight, bias, stride, padding, dilation, groups).permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W): a view, which convolutions read as channels-last."""
    x = x.permute(0, 3, 1, 2)
    # The compiler chooses layouts itself, and fails on a convolution of a permuted map of symbolic size ("Invalid
    # ranges [0:-1]" of inductor in PyTorch 2.13). It merges this copy into the op before.
    return x.contiguous() if torch.compiler.is_compiling() else x


@Op
def embed_patches(
    x: Tensor,
    conv1: tuple[Tensor, Tensor],
    norm1: tuple[Tensor, Tensor],
    eps1: float,
    conv2: tuple[Tensor, Tensor],
    norm2: tuple[Tensor, Tensor],
    eps2: float,
) -> Tensor:
    """The stem: image (B, H, W, in_channels) -> map (B, H / 4, W / 4, C), sides rounded up.

    Two 3x3 convolutions of stride 2 and padding 1, given as (weight, bias), each with a LayerNorm, given as (weight,
    bias); GELU in between.
    """
    x = F.layer_norm(convolve(x, *conv1, (2, 2), (1, 1), (1, 1), 1), norm1[0].shape, *norm1, eps1)
    x = convolve(F.gelu(x), *conv2, (2, 2), (1, 1), (1, 1), 1)
    return F.layer_norm(x, norm2[0].shape, *norm2, eps2)
