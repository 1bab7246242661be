"""Layers of vHeat that hold no heat: stem, downsampling, MLP, stochastic depth.

Shapes: B batch, H x W map, C channels. Maps are (B, H, W, C).
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .heat_conduction import convolve
from .kernels import step
from .positionwise import linear, mlp


class PointwiseConv(nn.Conv2d):
    """1x1 convolution of a (B, H, W, C) map, computed as the matrix product it is; weights stay 4-D as released."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two pointwise convolutions around an exact GELU, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(dim, hidden_dim)
        self.fc2 = PointwiseConv(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1.weight, cast(Tensor, self.fc1.bias), self.fc2.weight, cast(Tensor, self.fc2.bias))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch per sample, rescales the kept ones."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class Stem(nn.Module):
    """Image (B, H, W, in_channels) -> map (B, H/4, W/4, C), sides rounded up."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        # The release permutes around each norm inside a sequential, hence the keys ``norm1.1`` and ``norm2.1``.
        self.conv1 = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(nn.Identity(), nn.LayerNorm(dim // 2, eps=1e-6))
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(nn.Identity(), nn.LayerNorm(dim, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return embed_patches(x, self.conv1, self.norm1, self.conv2, self.norm2)


@step
def embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> Tensor:
    """Image (B, H, W, in_channels) -> map (B, H/4, W/4, C): two 3x3 convolutions of stride 2, a GELU in between."""
    x = F.gelu(norm1(convolve(x, conv1)))
    return norm2(convolve(x, conv2))


class Downsample(nn.Sequential):
    """Map (B, H, W, C) -> (B, H/2, W/2, 2C), sides rounded up."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False), nn.LayerNorm(2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](convolve(x, cast(nn.Conv2d, self[0])))
