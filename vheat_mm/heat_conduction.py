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
from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .freq_embed import fit_freq_embed
from .kernels import step
from .positionwise import by_position, linear, norm_gate, split_linear

_BASES: OrderedDict[tuple, Tensor] = OrderedDict()
_MAX_BASES = 256  # a matrix per side length seen: 800x1333 detection needs about 60


class HeatConduction2d(nn.Module):
    """Depthwise conv, split into signal and gate, heat conduction of the signal, norm, gate, projection.

    Args:
        dim: Channels C of input and output.
    """

    k_exp: nn.Parameter  # (H, W, C), once deployed

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.linear = nn.Linear(dim, 2 * dim)
        self.to_k = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.out_norm = nn.LayerNorm(dim)
        self.out_linear = nn.Linear(dim, dim)

    def decay(self, freq_embed: Tensor) -> Tensor:
        """Decay of every mode and channel for FVEs of the map's size, (H, W, C) -> (H, W, C).

        Computed in at least float32: ``w k`` spans several orders of magnitude and its exponential leaves float16.
        """
        k = cast(nn.Linear, self.to_k[0])
        return decay_map(freq_embed, k.weight, k.bias)

    def forward(self, x: Tensor, decay: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            x: Map (B, H, W, C).
            decay: What :meth:`decay` returns for this operator and size (H, W, C).

        Returns:
            Map (B, H, W, C).
        """
        out = self.out_linear
        return linear(self.mix(x, decay), out.weight, out.bias)

    def mix(self, x: Tensor, decay: Tensor) -> Tensor:
        """The operator without its projection: everything that mixes positions, (B, H, W, C) -> (B, H, W, C)."""
        x = convolve(x, self.dwconv)
        signal, gate = split_linear(x, self.linear.weight, self.linear.bias)
        del x  # its memory serves the next step
        norm = self.out_norm
        return heat_norm_gate(signal, gate, decay, norm.weight, norm.bias, norm.eps)

    def switch_to_deploy(self, freq_embed: Tensor) -> None:
        """Replace ``to_k`` by the constant decay ``k_exp`` (H, W, C), as the release's re-parameterisation does."""
        with torch.no_grad():
            self.k_exp = nn.Parameter(self.decay(freq_embed), requires_grad=False)
        del self.to_k


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


def squared_frequencies(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``w_nm = (pi n / H)^2 + (pi m / W)^2``, shape (H, W), in (rad / position)^2."""
    n = torch.arange(height, dtype=dtype, device=device) * (math.pi / height)
    m = torch.arange(width, dtype=dtype, device=device) * (math.pi / width)
    return n.square()[:, None] + m.square()


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II, shape (N, N): row k is mode k, ``sqrt(2/N) cos(pi k (x + 1/2) / N)``, row 0 over sqrt(2).

    Angles are reduced modulo a full turn in integers, so that high modes of large maps lose no digits.
    """
    k = torch.arange(n, device=device)
    turns = k[:, None] * (2 * k + 1) % (4 * n)  # in units of pi / 2N
    matrix = torch.cos(turns.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix.to(dtype)


def basis(n: int, like: Tensor) -> Tensor:
    """:func:`dct_matrix` in the type and on the device of ``like``, computed once."""
    # Tracers and tensor subclasses (fake tensors) must see the construction, not somebody else's tensor.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return dct_matrix(n, like.dtype, like.device)
    key = (n, like.dtype, like.device)
    if key in _BASES:
        _BASES.move_to_end(key)
        return _BASES[key]
    # A matrix born in inference mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        matrix = dct_matrix(n, like.dtype).to(like.device)
    _BASES[key] = matrix
    while len(_BASES) > _MAX_BASES:
        _BASES.popitem(last=False)
    return matrix


@step
def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a 2-D convolution to a (B, H, W, C) map; both permutations are views."""
    x = x.permute(0, 3, 1, 2)
    if torch.compiler.is_compiling():
        # The compiler chooses layouts itself, and fails on a convolution of a permuted map of symbolic size ("Invalid
        # ranges [0:-1]" of inductor in PyTorch 2.13). It merges this copy into the step before.
        x = x.contiguous()
    return conv(x).permute(0, 2, 3, 1)
